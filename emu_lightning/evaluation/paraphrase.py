"""Prompts in other words, by a language model: an endpoint or a folder. Every answer is kept."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

INSTRUCTION = (
    "You are given what somebody typed to have a picture made. Say it again in your own words, as another "
    "person would type it: plain, short, in the same language. Keep every subject, number, attribute, place "
    "and style it asks for, and add none. Leave out words that only steer a tool, such as camera models, "
    "resolutions and lists of quality words. Answer with the new request alone, on one line."
)
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_WAIT = 60.0  # seconds
_MAX_REPLY = 1 << 20  # bytes
_REFUSAL = re.compile(r"\s*(i['’]?m sorry|i am sorry|sorry,|i can(no|['’])t|i['’]m unable|as an ai\b)", re.I)


class Rewriter(Protocol):
    """Says a text in other words.

    ``settings`` is all that an answer depends on, without secrets; ``num_workers`` may be asked at a time.
    """

    @property
    def num_workers(self) -> int: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def __call__(self, text: str) -> str: ...


@dataclass(frozen=True)
class ChatEndpoint:
    """Any service that speaks OpenAI's chat completions: hosted, or a server of your own.

    Args:
        url: up to and without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: the name that the service knows.
        key_variable: environment variable with the key; none is sent where it is not set.
        instruction: the system message.
        options: what else goes into each request, such as ``{"temperature": 0, "max_tokens": 200}``.
        timeout: seconds to wait for one answer.
        num_tries: for each text, where the service is busy, failing or out of reach.
        first_wait: seconds before the second try; then twice as long each time, up to a minute, or as long as
            the service asks for.
        num_workers: requests at a time.

    Raises:
        ValueError: the URL is not http or https, or holds a password.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    instruction: str = INSTRUCTION
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    timeout: float = 60.0
    num_tries: int = 5
    first_wait: float = 1.0
    num_workers: int = 8

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"{self.url!r} is no address of a service: it begins with http:// or https://")
        if urlsplit(self.url).password is not None:  # settings are written down
            raise ValueError(f"the address of {self.model} holds a password: give it by {self.key_variable}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """The key is not in it, nor anything else an answer does not depend on."""
        return {
            "url": self.url,
            "model": self.model,
            "instruction": self.instruction,
            "options": self.options,
        }

    def __call__(self, text: str) -> str:
        """One answer.

        Raises:
            OSError: the service refused, or was out of reach at every try.
            ValueError: what came is no chat completion.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps({**self.options, "model": self.model, "messages": self._messages(text)}).encode(),
            headers={"Content-Type": "application/json", **self._authorization()},
        )
        for attempt in range(1, self.num_tries + 1):
            wait = min(_MAX_WAIT, self.first_wait * 2 ** (attempt - 1))
            try:
                with _OPENER.open(request, timeout=self.timeout) as reply:
                    return _content(reply.read(_MAX_REPLY), self.url)
            except urllib.error.HTTPError as error:
                with error:
                    cause = f"{error.code} {error.reason}"
                    asked = error.headers.get("Retry-After") or ""
                if error.code not in _RETRIED:
                    raise OSError(f"{self.url} refused the request: {cause}") from None
                wait = min(_MAX_WAIT, float(asked)) if asked.isdigit() else wait
            except (OSError, http.client.HTTPException) as error:
                cause = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.num_tries:
                time.sleep(wait)
        raise OSError(f"{self.url} gave no answer in {self.num_tries} tries: {cause}")

    def _messages(self, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}]

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another machine."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _content(reply: bytes, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError(f"{url} sent no chat completion: is this the address of its API, up to /v1?")
    return content


@dataclass(frozen=True)
class LocalModel:
    """A causal language model of transformers in a folder of this machine; answers are greedy.

    Args:
        path: folder with the model, its weights as safetensors, and its tokenizer.
        instruction: the system message; where the tokenizer has no chat template, what the text follows.
        max_tokens: of an answer.
        device: as torch names it; a GPU where there is one, when left out.
    """

    path: str
    instruction: str = INSTRUCTION
    max_tokens: int = 128
    device: str | None = None
    num_workers = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"path": self.path, "instruction": self.instruction, "max_tokens": self.max_tokens}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"{self.path} is no folder with a language model: download one first")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(self.path, local_files_only=True, use_safetensors=True)
        return tokenizer, model.eval().to(torch.device(device))

    def __call__(self, text: str) -> str:
        tokenizer, model = self._loaded
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = f"{self.instruction}\n\n{text}\n\n"
        asked = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        asked = asked.to(model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        answer = model.generate(
            **asked, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1, pad_token_id=pad
        )
        words: str = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return words


# --- many texts ---------------------------------------------------------------------------------------------


def rewrite_all(texts: Sequence[str], rewriter: Rewriter, cache: str | Path) -> dict[str, str]:
    """The answer to each text, from ``cache`` where it is there: after a kill nothing is asked twice.

    Args:
        texts: what is to be said in other words.
        rewriter: who says it.
        cache: file of JSON lines, each with an original, its rewrite as it came, and what asked for it; lines
            are only ever appended.
    """
    settings = dict(rewriter.settings)
    made_by = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    known = {row["original"]: row["rewrite"] for row in _read_cache(Path(cache)) if row["made_by"] == made_by}
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    failure: Exception | None = None
    with _appending(Path(cache)) as append, ThreadPoolExecutor(rewriter.num_workers) as pool:
        asked = {pool.submit(rewriter, text): text for text in missing}
        try:
            for future in tqdm(as_completed(asked), total=len(asked), desc="paraphrasing", unit="prompt"):
                if future.cancelled():
                    continue
                try:
                    original, rewrite = asked[future], future.result()
                except Exception as error:
                    failure = failure or error
                    _cancel(asked)
                    continue  # what has been asked meanwhile is worth keeping
                append({"original": original, "rewrite": rewrite, "made_by": made_by})
                known[original] = rewrite
        finally:
            _cancel(asked)
    if failure is not None:
        raise failure
    return {text: known[text] for text in texts}


def _cancel(futures: Iterable[Future[str]]) -> None:
    for future in futures:
        future.cancel()


def why_rejected(original: str, rewrite: str) -> str:
    """Why a rewrite cannot stand for its original; empty where it can.

    It has to be one line, no refusal, at least a quarter as long, and at most twice as long and eight words.
    Long originals shrink: much in them only steered a tool. The limits are our choice.
    """
    if not rewrite.strip():
        return "empty"
    if "\n" in rewrite.strip():
        return "several lines"
    if _REFUSAL.match(rewrite):
        return "a refusal"
    before, after = len(original.split()), len(rewrite.split())
    if after < before / 4:
        return "too short"
    return "too long" if after > 2 * before + 8 else ""


def _read_cache(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill: asked again
        if isinstance(row, dict) and row.keys() >= {"original", "rewrite", "made_by"}:
            yield row


@contextmanager
def _appending(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # what follows a torn line is a line of its own

        def append(row: Mapping[str, str]) -> None:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()

        yield append
