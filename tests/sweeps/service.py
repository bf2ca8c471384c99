"""A stand-in of the W&B service on this machine: what its clients ask of it, answered from memory.

It proves that the real `wandb sweep`, `wandb agent`, `wandb sync` and `wandb.Api` are spoken to; not how the
real server behaves.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from typing import Any

import yaml

SWEEP = "sw33p1d0"


@dataclass
class Service:
    """What the stand-in has been told."""

    url: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # of the sweep
    due: list[dict[str, Any]] = field(default_factory=list)  # parameters not yet given to an agent
    given: dict[str, dict[str, Any]] = field(default_factory=dict)  # run -> parameters
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # run -> what UpsertBucket said, last
    history: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # run -> line number -> row
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)  # run -> last values
    exit_codes: dict[str, int] = field(default_factory=dict)
    views: list[dict[str, Any]] = field(default_factory=list)  # workspaces and reports that were saved
    files: list[tuple[str, bytes]] = field(default_factory=list)  # uploaded, by name
    operations: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of a client that is online here and nowhere else."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "x" * 40, "WANDB_ENTITY": "us"}

    # --- GraphQL --------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query
        self.operations.append(name)
        answers = getattr(self, f"_{name}", None)
        if answers is None:
            self.unknown.append(name)
            return {}
        result: dict[str, Any] = answers(variables)
        return result

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertSweep(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.config = yaml.safe_load(asked["config"])
        values = {
            name: spec["values"] if "values" in spec else [spec["value"]]
            for name, spec in sorted(self.config["parameters"].items())  # in another order than the file's
        }
        self.due = [dict(zip(values, each, strict=True)) for each in product(*values.values())]
        project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "us"}}
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, _: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "s", "name": SWEEP, "state": "RUNNING", "config": yaml.safe_dump(self.config)}
        return {"project": {"sweep": {**sweep, "method": self.config["method"], "runs": {"edges": []}}}}

    def _CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "a"}}}

    def _Heartbeat(self, asked: dict[str, Any]) -> dict[str, Any]:
        commands: list[dict[str, Any]] = []
        if not json.loads(asked["runState"]):
            if self.due:
                run = f"run{len(self.given):05d}"
                self.given[run] = self.due.pop(0)
                args = {name: {"value": value} for name, value in self.given[run].items()}
                commands = [{"type": "run", "run_id": run, "args": args, "program": self.config["program"]}]
            else:
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = asked["name"]
        is_new = run not in self.runs
        self.runs[run] = self.runs.get(run, {}) | {
            key: value for key, value in asked.items() if value is not None
        }
        project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "us"}}
        bucket = {
            "id": run,
            "name": run,
            "displayName": asked.get("displayName") or run,
            "sweepName": asked.get("sweep"),
            "historyLineCount": len(self.history.get(run, {})),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = asked["name"]
        if run not in self.runs:
            return {
                "model": {"id": "p", "name": "tests", "entity": {"id": "e", "name": "us"}, "bucket": None}
            }
        lines = self.history.get(run, {})
        bucket = {
            "id": run,
            "name": run,
            "summaryMetrics": json.dumps(lines[max(lines)] if lines else {}),
            "displayName": run,
            "logLineCount": 0,
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(lines[max(lines)])] if lines else []),
            "eventsTail": "[]",
            "config": self.runs[run].get("config") or "{}",
            "tags": [],
            "wandbConfig": self.runs[run].get("config") or "{}",
        }
        return {"model": {"id": "p", "name": "tests", "entity": {"id": "e", "name": "us"}, "bucket": bucket}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    # --- what is read back ----------------------------------------------------------------------------------

    def _Runs(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A page of one run, so that the client has to turn pages."""
        project = [run for run, told in self.runs.items() if told["project"] == asked["project"]]
        if not project:
            return {"project": None}
        sweep = json.loads(asked["filters"]).get("sweep")
        runs = [run for run in project if sweep is None or self.runs[run].get("sweep") == sweep]
        begin = runs.index(asked["cursor"]) + 1 if asked["cursor"] else 0
        found = {
            "internalId": 1,
            "runCount": len(runs),
            "readOnly": False,
            "runs": {
                "edges": [{"node": self._run(run), "cursor": run} for run in runs[begin : begin + 1]],
                "pageInfo": {"endCursor": None, "hasNextPage": begin + 1 < len(runs)},
            },
        }
        return {"project": found}

    def _run(self, run: str) -> dict[str, Any]:
        told = self.runs[run]
        ended = {0: "finished", None: told.get("state", "running")}
        return {
            "id": run,
            "projectId": 1,
            "name": run,
            "displayName": told.get("displayName") or run,
            "sweepName": told.get("sweep"),
            "state": ended.get(self.exit_codes.get(run), "failed"),
            "config": told.get("config") or "{}",
            "summaryMetrics": json.dumps(self.summary.get(run, {})),
            "systemMetrics": "{}",
            "tags": [],
            "user": {"name": "us", "username": "us"},
        }

    def _RunHistoryKeys(self, asked: dict[str, Any]) -> dict[str, Any]:
        steps = [row["_step"] for row in self.history.get(asked["name"], {}).values()]
        return {"project": {"run": {"historyKeys": {"lastStep": max(steps, default=-1)}}}}

    def _RunParquetHistory(self, asked: dict[str, Any]) -> dict[str, Any]:
        rows = self.history.get(asked["runName"], {}).values()
        live = [{"_step": row["_step"]} for row in rows]  # nothing is in files yet
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}

    def _HistoryPage(self, asked: dict[str, Any]) -> dict[str, Any]:
        rows = self.history.get(asked["run"], {}).values()
        page = [json.dumps(row) for row in rows if asked["minStep"] <= row["_step"] < asked["maxStep"]]
        return {"project": {"run": {"history": page}}}

    # --- workspaces and reports -----------------------------------------------------------------------------

    def _ProjectInternalId(self, asked: dict[str, Any]) -> dict[str, Any]:
        is_known = asked["projectName"] in {told["project"] for told in self.runs.values()}
        return {"project": {"id": "p", "internalId": "1"} if is_known else None}

    def _GetProjects(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
        edges = [
            {"node": {"id": name, "name": name, "entityName": asked["entity"], **known}, "cursor": name}
            for name in sorted({told["project"] for told in self.runs.values()})
        ]
        return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def _UpsertView2(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.views.append(asked)
        view = {"id": f"view{len(self.views)}", "name": asked["name"], "displayName": asked["displayName"]}
        view |= {"spec": asked["spec"], "description": asked["description"], "type": asked["type"]}
        view |= {"project": {"id": "p", "name": asked["projectName"], "entityName": asked["entityName"]}}
        return {"upsertView": {"view": view, "inserted": True}}

    _upsertView = _UpsertView2  # a workspace, a report

    # --- artifacts, which hold the pictures of tables -------------------------------------------------------

    def _CreateArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "name": "manifest", "displayName": "m", "uploadUrl": f"{self.url}/upload/manifest"}
        return {
            "createArtifactManifest": {"artifactManifest": {"id": "m", "file": {**file, "uploadHeaders": []}}}
        }

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in asked["input"]["artifactFiles"]:
            name = file["name"]
            node = {"id": name, "name": name, "displayName": name, "uploadUrl": f"{self.url}/upload/{name}"}
            node |= {
                "uploadHeaders": [],
                "storagePath": name,
                "artifact": {"id": "a"},
                "uploadMultipartUrls": None,
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "a", "digest": ""}}}

    # --- the stream of a run's lines ------------------------------------------------------------------------

    def stream(self, run: str, chunk: dict[str, Any]) -> None:
        for name, part in (chunk.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                lines = self.history.setdefault(run, {})
                for number, line in enumerate(part["content"], part["offset"]):
                    lines[number] = json.loads(line, parse_constant=str)  # NaN as the service keeps it
            elif name == "wandb-summary.json":
                self.summary[run] = json.loads(part["content"][-1])
        if chunk.get("complete"):
            self.exit_codes[run] = chunk["exitcode"]


@contextmanager
def service() -> Iterator[Service]:
    """A stand-in that answers until the context ends."""
    told = Service()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            told.files.append((self.path.removeprefix("/upload/"), self._body()))
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                self._answer({"data": told.answer(asked["query"], asked.get("variables") or {})})
                return
            if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                told.stream(found[1], json.loads(body))
            self._answer({})

        def log_message(self, *_: Any) -> None:
            """Nothing: tests look at what was told."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
