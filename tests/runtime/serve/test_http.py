"""The HTTP side over an engine that continues every text by rote: answers, errors, limits, the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import moeless_opt as mo
from moeless_opt.problems.io import plan_to_json
from tests.runtime.serve.doubles import RoteEngine

for package in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(package, reason="needs the extra 'serve'")


@pytest.fixture(scope="module")
def rote(serving: Callable[..., Any]) -> Iterator[Any]:
    """A server that answers at once."""
    with serving(RoteEngine(), max_body=20000, max_choices=8) as served:
        yield served


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(content: str) -> list[Any]:
    """What a stream told, the last being ``[DONE]``."""
    parts = [part for part in content.split("\n\n") if part]
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_with_several_answers_counts_once(rote: Any, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": ["hello", "hi", "hi"], "n": 2, "max_tokens": 3}
    if stream:
        more = {"stream": True, "stream_options": {"include_usage": True}}
        told = events(rote.ask("POST", "/v1/completions", body | more)[2])[-2]
    else:
        told = rote.ask("POST", "/v1/completions", body)[2]
    assert told["usage"]["prompt_tokens"] == 6 + 3 + 3
    assert told["usage"]["completion_tokens"] == 2 * 3 * 3


def test_a_completion_has_what_openai_says(rote: Any) -> None:
    status, headers, told = rote.ask(
        "POST", "/v1/completions", {"prompt": "hello", "max_tokens": 3, "logprobs": 2}
    )
    assert status == 200
    assert headers["x-request-id"] in told["id"]
    assert told["object"] == "text_completion"
    assert told["model"] == "rote"
    assert told["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 6,
        "completion_tokens": 3,
        "total_tokens": 9,
        "prompt_tokens_details": None,
    }
    (choice,) = told["choices"]
    assert len(choice["text"]) == 3
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list(choice["text"])
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "b": -1.5}


def test_completions_are_16_tokens_long_unless_said(rote: Any) -> None:
    told = rote.ask("POST", "/v1/completions", {"prompt": "hello"})[2]
    assert told["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", [["ab", "c"], [[97, 98], [99]]])
def test_several_prompts_and_answers_come_in_order(rote: Any, prompt: Any) -> None:
    asked = {"prompt": prompt, "n": 2, "max_tokens": 2, "seed": 5, "echo": True, "temperature": 1}
    told = rote.ask("POST", "/v1/completions", asked)[2]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:-2] for choice in told["choices"]] == ["ab", "ab", "c", "c"]
    texts = [choice["text"] for choice in told["choices"]]
    assert texts[0] != texts[1], "answers of one prompt have seeds of their own"
    assert rote.ask("POST", "/v1/completions", asked)[2]["choices"] == told["choices"]


def test_what_is_asked_for_reaches_the_engine(rote: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": -3, "stop": ["q", "z"],
        "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 4, "ignore_eos": True,
    }  # fmt: skip
    told = rote.ask("POST", "/v1/chat/completions", asked)[2]
    request = rote.engine.seen[-1]
    sampling = request.sampling
    assert bytes(request.prompt[1:]) == b"user: ab\n"
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.stop, sampling.max_tokens, sampling.logprobs) == (("q", "z"), 9, 4)
    assert sampling.ignore_end
    assert told["choices"][0]["message"]["role"] == "assistant"
    content = told["choices"][0]["logprobs"]["content"]
    assert len(content) == told["usage"]["completion_tokens"]
    assert len(content[0]["top_logprobs"]) == 4
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


def test_a_stream_tells_the_same_as_the_whole(rote: Any) -> None:
    asked = {
        "messages": [{"role": "user", "content": "hi"}],
        "n": 2,
        "seed": 1,
        "max_tokens": 5,
        "logprobs": True,
    }
    whole = rote.ask("POST", "/v1/chat/completions", asked)[2]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, content = rote.ask("POST", "/v1/chat/completions", asked | more)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(content)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 10
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]
        told = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_a_text_ends_at_a_stop_text(rote: Any) -> None:
    asked = {"prompt": "hello", "max_tokens": 26, "temperature": 0, "stop": "c"}
    for stream in (False, True):
        told = rote.ask("POST", "/v1/completions", asked | {"stream": stream})[2]
        if stream:
            pieces = events(told)[:-1]
            text = "".join(piece["choices"][0]["text"] for piece in pieces)
            assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            text = told["choices"][0]["text"]
            assert told["choices"][0]["finish_reason"] == "stop"
        assert text
        assert "c" not in text


def test_a_stream_that_waits_shows_that_it_lives(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeless_opt.runtime.serve.http.generation.HEARTBEAT", 0.1)
    with serving(RoteEngine(pace=0.35)) as served:
        asked = {"prompt": "x", "max_tokens": 2}
        content = served.ask("POST", "/v1/completions", asked | {"stream": True})[2]
        parts = content.split("\n\n")
        assert ": still waiting" in parts
        assert len(events("\n\n".join(part for part in parts if not part.startswith(":")))) == 3
        assert len(served.ask("POST", "/v1/completions", asked)[2]["choices"][0]["text"]) == 2


# -------------------------------------------------------------------------------------------- errors

CHAT = {"messages": [{"role": "user", "content": "x"}]}
BAD: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", b"", 400, None),
    ("/v1/completions", b"{", 400, None),
    ("/v1/completions", b"[1]", 400, None),
    ("/v1/completions", b"null", 400, None),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, None),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "prompt"),
    ("/v1/completions", b'{"\\ud800": 1, "prompt": "x"}', 400, None),
    ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    ("/v1/completions", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, None),
    ("/v1/completions", b"[" * 9000, 400, None),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": None}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [99999]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x" * 600}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": "7"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "temperature": 1e300}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "x", "top_k": -1}, 400, "top_k"),
    ("/v1/completions", {"prompt": "x", "n": 0}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "n": 9}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "x", "seed": 2**63}, 400, "seed"),
    ("/v1/completions", {"prompt": "x", "stop": ""}, 400, "stop"),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty"),
    ("/v1/completions", {"prompt": "x", "colour": "red"}, 400, "colour"),
    ("/v1/completions", {"prompt": "x", "model": "gpt-9"}, 404, "model"),
    ("/v1/completions", {"prompt": "x", "model": 9}, 400, "model"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "y" * 30000}, 413, None),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/plan", {}, 400, None),
    ("/v1/plan", [], 400, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=lambda x: repr(x)[:60])
def test_bad_input_is_told_in_openais_form(
    rote: Any, path: str, body: Any, status: int, param: str | None
) -> None:
    seen = len(rote.engine.seen)
    found, _, told = rote.ask("POST", path, body)
    assert found == status, told
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["message"]
    assert param is None or told["error"]["param"] == param, told
    assert len(rote.engine.seen) == seen


def test_what_changes_nothing_may_be_said(rote: Any) -> None:
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "user": "me", "seed": None}
    more = {"best_of": 1, "suffix": None, "stop": None, "echo": False, "logprobs": None}
    assert rote.ask("POST", "/v1/completions", {"prompt": "x"} | neutral | more)[0] == 200
    more = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    assert rote.ask("POST", "/v1/chat/completions", CHAT | neutral | more)[0] == 200


def test_unknown_places_methods_and_types_are_told(rote: Any) -> None:
    assert rote.ask("GET", "/v1/nothing")[0] == 404
    assert rote.ask("GET", "/v1/models/nothing")[2]["error"]["code"] == "model_not_found"
    assert rote.ask("DELETE", "/v1/completions")[0] == 405
    status, _, told = rote.ask("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "text/plain"})
    assert status == 415
    assert "application/json" in told["error"]["message"]


def test_other_names_for_this_machine_are_refused(rote: Any) -> None:
    status, _, told = rote.ask("GET", "/v1/models", headers={"Host": "evil.example:80"})
    assert status == 403
    assert told["error"]["code"] == "unknown_host"
    assert rote.ask("GET", "/v1/models", headers={"Host": "[::1]:8000"})[0] == 200


def test_keys_open_what_they_may(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), api_keys=("one", "two"), admin_keys=("boss",)) as served:
        for path in ("/healthz", "/readyz", "/metrics", "/", "/openapi.json"):
            assert served.ask("GET", path)[0] == 200
        assert served.ask("GET", "/v1/models")[0] == 401
        assert served.ask("GET", "/v1/models", headers={"Authorization": "Bearer three"})[0] == 401
        assert served.ask("GET", "/v1/models", headers={"Authorization": "Bearer two"})[0] == 200
        body = {"paused": True}
        assert served.ask("PATCH", "/v1/planning", body, {"Authorization": "Bearer two"})[0] == 403
        assert served.ask("PATCH", "/v1/planning", body, {"Authorization": "Bearer boss"})[0] == 200


# ------------------------------------------------------------------------------------- control, figures


def test_plans_and_settings_are_seen_and_changed(rote: Any) -> None:
    plan = rote.ask("GET", "/v1/plan")[2]
    assert plan == json.loads(json.dumps(plan_to_json(rote.engine.placed)))
    assert rote.ask("POST", "/v1/plan", plan)[2]["kind"] == "given"
    wrong = plan_to_json(mo.plan([[1, 2, 3, 4]], mo.uniform(1, 2, slots=2)))
    status, _, told = rote.ask("POST", "/v1/plan", wrong)
    assert (status, told["error"]["code"]) == (400, "invalid_plan")
    before = rote.ask("GET", "/v1/planning")[2]
    changed = rote.ask("PATCH", "/v1/planning", {"paused": True, "max_moves": 3})[2]
    assert changed == before | {"paused": True, "max_moves": 3}
    assert rote.ask("PATCH", "/v1/planning", {"policy": "guess"})[0] == 400
    assert rote.ask("PATCH", "/v1/planning", {"every": 0, "paused": False})[0] == 400
    assert rote.ask("GET", "/v1/planning")[2] == changed
    assert rote.ask("PATCH", "/v1/planning", {"paused": False, "max_moves": None})[2] == before
    rote.ask("PATCH", "/v1/planning", {"policy": "eplb", "every": 3, "paused": True, "slots": 9})
    default = {"policy": None, "every": None, "paused": None, "slots": None}
    assert rote.ask("PATCH", "/v1/planning", default)[2] == before


def test_metrics_are_prometheus(rote: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    rote.ask("POST", "/v1/completions", {"prompt": "x"})
    status, headers, content = rote.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {f.name: f.samples for f in text_string_to_metric_families(content)}
    for name in (
        "moeless_requests", "moeless_time_to_first_token_seconds", "moeless_time_per_output_token_seconds",
        "moeless_requests_waiting", "moeless_kv_blocks_used", "moeless_layer_imbalance",
        "moeless_layer_replicas",
        "moeless_plans", "moeless_moved_bytes", "moeless_weight_wait_seconds", "moeless_cold_starts",
        "moeless_cost_gigabyte_seconds", "moeless_prediction_error",
    ):  # fmt: skip
        assert found[name], name
    assert {s.labels["layer"] for s in found["moeless_layer_imbalance"]} == {"1", "3"}
    assert {s.labels["rule"] for s in found["moeless_cost_gigabyte_seconds"]} == {
        "resident",
        "passes",
        "functions",
    }
    paths = {s.labels["path"] for s in found["moeless_http_requests"]}
    assert "/v1/completions" in paths
    assert "/v1/models/nothing" not in paths, "labels must not grow with what clients ask"


def test_the_status_has_what_the_page_shows(rote: Any) -> None:
    wait_until(lambda: bool(rote.ask("GET", "/v1/status")[2]["history"]))
    told = rote.ask("GET", "/v1/status")[2]
    assert told["layers"] == [1, 3]
    assert len(told["rows"]) == len(told["replicas"]) == 2
    newest = told["history"][-1]["at"]
    assert all(
        sample["at"] > newest for sample in rote.ask("GET", f"/v1/status?since={newest}")[2]["history"]
    )
    assert rote.ask("GET", "/v1/status?since=-1")[0] == 400


def test_the_page_needs_nothing_but_itself(rote: Any) -> None:
    status, headers, content = rote.ask("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    for word in ("src=", "href=", "@import", "url("):
        assert word not in content


# ------------------------------------------------------------------------------------- life and death


def test_a_server_says_that_it_loads(serving: Callable[..., Any]) -> None:
    import urllib.request

    from moeless_opt.runtime.serve.http import HttpOptions, HttpServer

    server = HttpServer(RoteEngine(loading=1.0), HttpOptions(port=0))
    thread = threading.Thread(target=server.run, args=(lambda: None,))
    thread.start()
    try:
        with urllib.request.urlopen(f"{server.address}/healthz", timeout=30) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(f"{server.address}/readyz", timeout=30)
        with found.value as error:
            assert error.code == 503
            assert json.load(error)["error"]["code"] == "loading"
    finally:
        server.stop()
        thread.join(30)


def test_an_engine_that_cannot_start_ends_the_server() -> None:
    from moeless_opt.runtime.serve.http import HttpOptions, HttpServer

    engine = RoteEngine()
    engine.broken = "is no model"
    server = HttpServer(engine, HttpOptions(port=0))
    with pytest.raises(mo.ProblemError, match="is no model"):
        server.run(lambda: None)


def test_an_engine_that_fails_for_good_ends_the_server(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeless_opt.runtime.serve.http.front.PATIENCE", 1.5)
    engine = RoteEngine()
    with serving(engine) as served:
        assert served.ask("GET", "/healthz")[0] == 200
        engine.drain()  # its thread ends, and nobody asked the server to
        wait_until(lambda: served.ask("GET", "/readyz")[0] == 503)
        served.thread.join(30)
        assert served.results == [False]


def test_a_taken_port_is_told(rote: Any) -> None:
    from moeless_opt.runtime.serve.http import HttpOptions, HttpServer

    with pytest.raises(mo.ProblemError, match="cannot be listened at"):
        HttpServer(RoteEngine(), HttpOptions(port=rote.port))


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(serving: Callable[..., Any]) -> None:
    answers: list[tuple[int, Any]] = []
    engine = RoteEngine(pace=0.02, room=4)
    with serving(engine) as served:

        def ask(stream: bool) -> None:
            status, _, told = served.ask(
                "POST", "/v1/completions", {"prompt": "x", "max_tokens": 40, "stream": stream}
            )
            answers.append((status, told))

        clients = [threading.Thread(target=ask, args=(bool(k % 2),)) for k in range(8)]
        for client in clients:
            client.start()
        wait_until(lambda: len(engine.seen) == 8)
        served.server.stop()
        wait_until(lambda: served.ask("GET", "/readyz")[0] == 503)
        status, headers, told = served.ask("POST", "/v1/completions", {"prompt": "late"})
        assert (status, told["error"]["code"]) == (503, "draining")
        assert "retry-after" in headers
        for client in clients:
            client.join(60)
        served.thread.join(60)
        assert served.results == [True]
    assert len(answers) == 8
    for status, told in answers:
        assert status == 200
        if isinstance(told, str):
            assert events(told)[-1] == "[DONE]"
        else:
            assert told["usage"]["completion_tokens"] == 40


def test_what_is_not_finished_in_time_is_told(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.1)
    found: list[Any] = []
    with serving(engine, drain_timeout=0.3) as served:
        asked = {"prompt": "x", "max_tokens": 400, "stream": True}
        client = threading.Thread(target=lambda: found.append(served.ask("POST", "/v1/completions", asked)))
        client.start()
        wait_until(lambda: bool(engine.seen))
        served.server.stop()
        client.join(60)
        served.thread.join(60)
        assert served.results == [False]
    assert events(found[0][2])[-1]["error"]["code"] == "generation_error"
