"""Paraphrasing against a stand-in of an endpoint that answers, fails and hangs up as real ones do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emu_lightning.evaluation.paraphrase import ChatEndpoint, LocalModel, rewrite_all, why_rejected


class Service(ThreadingHTTPServer):
    """Says every text backwards; `faults` are what goes wrong first: a status, or "hang up"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[int | str] = []
        self.answer: Callable[[str], object] = lambda text: completion(text[::-1])
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


def completion(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.headers.append(dict(self.headers))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            self.connection.close()
            return
        self.server.requests.append(body)
        if fault is not None:
            self.send_response(int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        reply = json.dumps(self.server.answer(body["messages"][-1]["content"])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(service: Service, **options: object) -> ChatEndpoint:
    return ChatEndpoint(service.url, "some-model", first_wait=0.001, **options)  # type: ignore[arg-type]


# --- the endpoint -------------------------------------------------------------------------------------------


def test_a_request_holds_model_options_instruction_and_text(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert endpoint(service, options={"temperature": 0.5})("a “cat”") == "”tac“ a"
    (request,) = service.requests
    assert request["model"] == "some-model" and request["temperature"] == 0.5
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert "Authorization" not in service.headers[0]
    monkeypatch.setenv("MY_KEY", "s3cret")
    rewriter = endpoint(service, key_variable="MY_KEY")
    rewriter("x")
    assert service.headers[1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in json.dumps(dict(rewriter.settings)) + repr(rewriter)


@pytest.mark.parametrize("faults", [[429, 503, 500], ["hang up", "hang up"], [408, "hang up", 502, 504]])
def test_a_busy_or_failing_service_is_asked_again(service: Service, faults: list) -> None:
    service.faults = list(faults)
    assert endpoint(service)("abc") == "cba"
    assert len(service.headers) == len(faults) + 1


def test_it_is_not_asked_for_ever_and_not_at_all_after_a_refusal(service: Service) -> None:
    service.faults = [500] * 9
    with pytest.raises(OSError, match="no answer in 3 tries: 500"):
        endpoint(service, num_tries=3)("abc")
    assert len(service.requests) == 3
    service.faults = [401]
    with pytest.raises(OSError, match="refused the request: 401"):
        endpoint(service)("abc")
    assert len(service.requests) == 4
    service.faults = [307]  # to where the key would go, too
    with pytest.raises(OSError, match="refused the request: 307"):
        endpoint(service)("abc")
    assert len(service.requests) == 5


def test_nobody_there_and_something_else_there_are_told_in_a_line(service: Service) -> None:
    service.answer = lambda text: {"hello": "world"}
    with pytest.raises(ValueError, match="no chat completion") as error:
        endpoint(service)("abc")
    assert service.url in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OSError, match="no answer in 2 tries: .*refused"):
        ChatEndpoint("http://127.0.0.1:9/v1", "m", num_tries=2, first_wait=0.001)("abc")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", "http://me:pw@localhost/v1"])
def test_what_is_no_address_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http|password"):
        ChatEndpoint(url, "m")


# --- a model of this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize("has_template", [False, True])
def test_a_local_model_continues_what_it_is_given(has_template: bool, tmp_path: Path) -> None:
    """Greedy words of a tiny GPT-2, against its logits taken one token at a time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<end>", "say", "it", "again", "a", "red", "cat", "user", "system"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    if has_template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(3)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words),
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(tmp_path)

    answer = LocalModel(str(tmp_path), instruction="say it again", max_tokens=4, device="cpu")("a red cat")

    network = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    start = "system say it again user a red cat" if has_template else "say it again a red cat"
    ids, expected = [words.index(word) for word in start.split()], []
    for _ in range(4):
        with torch.no_grad():
            token = int(network(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == 0:
            break
        expected.append(words[token])
    assert answer.split() == expected and expected
    with pytest.raises(FileNotFoundError, match="no folder with a language model"):
        LocalModel(str(tmp_path / "none"))("x")


# --- many texts ---------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_after_a_kill(service: Service, tmp_path: Path) -> None:
    cache = tmp_path / "out" / "rewrites.jsonl"
    texts = [f"text {n}" for n in range(12)]
    failing = endpoint(service, num_workers=1, num_tries=1)
    service.answer = lambda text: completion(text[::-1]) if text != "text 7" else {}
    with pytest.raises(ValueError, match="no chat completion"):
        rewrite_all(texts, failing, cache)
    asked = service.texts
    done = [json.loads(line)["original"] for line in cache.read_text().splitlines()]
    assert set(done) == set(asked) - {"text 7"} and len(asked) < 12
    with cache.open("a") as file:
        file.write('{"original": "text 9", "rewr')  # torn by a kill
    service.answer = lambda text: completion(text[::-1])
    service.requests.clear()
    rewritten = rewrite_all(texts, endpoint(service), cache)
    assert rewritten == {text: text[::-1] for text in texts} and list(rewritten) == texts
    assert sorted(service.texts) == sorted(set(texts) - set(done))
    service.requests.clear()
    assert rewrite_all(texts[:3], endpoint(service), cache) == {text: text[::-1] for text in texts[:3]}
    assert service.requests == []
    rows = [line for line in cache.read_text().splitlines() if line.endswith("}")]
    assert sorted(json.loads(line)["original"] for line in rows) == sorted(texts)


def test_another_instruction_or_model_is_asked_anew(service: Service, tmp_path: Path) -> None:
    cache = tmp_path / "rewrites.jsonl"
    rewrite_all(["abc", "abc"], endpoint(service), cache)
    assert service.texts == ["abc"]
    rewrite_all(["abc"], endpoint(service, instruction="Shout it."), cache)
    rewrite_all(["abc"], endpoint(service, options={"temperature": 1}), cache)
    rewrite_all(["abc"], endpoint(service, num_workers=3, timeout=9.0), cache)  # no answer depends on these
    assert service.texts == ["abc"] * 3


@pytest.mark.parametrize(
    "original,rewrite,reason",
    [
        ("a cat", "a picture of a cat on a mat", ""),
        ("a cat", "cat", ""),
        ("a cat", "  ", "empty"),
        ("a cat", "Sure!\n\nA cat.", "several lines"),
        ("a cat", "A cat.\n", ""),
        ("a cat", "I'm sorry, but I can't help with that.", "a refusal"),
        ("i can dance sign", "I can dance, on a sign", ""),
        ("cat", " ".join(["word"] * 10), ""),
        ("cat", " ".join(["word"] * 11), "too long"),
        (" ".join(["tag"] * 40), " ".join(["word"] * 10), ""),
        (" ".join(["tag"] * 40), " ".join(["word"] * 9), "too short"),
    ],
)
def test_what_cannot_stand_for_its_original(original: str, rewrite: str, reason: str) -> None:
    assert why_rejected(original, rewrite) == reason
