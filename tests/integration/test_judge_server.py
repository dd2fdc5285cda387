"""The judge `openai` against a server that fails in every way that servers do."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from earl.config import address as address_of
from earl.judges import Judgement, rubric
from earl.judges.model_judge import ModelJudge, Settings
from earl.judges.openai_model import OpenAIModel
from earl.messages.errors import EarlError
from tests.support import faulty_server
from tests.support.faulty_server import FAULTS, FIELDS, MODEL, NONE, WORDS, serving

RUBRICS = [
    rubric.load(Path(rubric.__file__).parent / "rubrics" / f"{name}.jsonnet")
    for name in ("semantic_consistency", "perceptual_quality")
]
ALL_IN_ONE = RUBRICS[0].model_copy(update={"name": "all in one", "scores": list(FIELDS)})
RETRIES = 2


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The file with the address of a running server."""
    path = tmp_path_factory.mktemp("server") / "address"
    process = subprocess.Popen([sys.executable, faulty_server.__file__, str(path)])
    yield str(path)
    process.kill()
    process.wait()


def judge_at(address: str, rubrics: list[rubric.Rubric] = RUBRICS, **changes) -> ModelJudge:
    options = {"concurrency": 64, "timeout": 2.0, "startup": 20.0, "patience": 1.0, "pause": (0.01, 0.05)}
    model = OpenAIModel(address, MODEL, **(options | changes))
    return ModelJudge("openai", model, rubrics, Settings(MODEL, None, image_size=8), RETRIES)


def asked(index: int, fault: str = NONE, passes_by: bool = True) -> tuple[Judgement, tuple[int, ...]]:
    scores = tuple(int(v) for v in np.random.default_rng(index).integers(0, 11, 4))
    edited = faulty_server.picture(index, scores, fault, passes_by)
    return Judgement("make it red", np.full((8, 8, 3), 255, np.uint8), edited), scores


CYCLE = 40


def plan(index: int) -> tuple[str, bool]:
    """What the server does about judgement ``index``: of 40, each fault once, one fault for good, the rest nothing."""
    transient = FAULTS[1:-1]
    if index % CYCLE < len(transient):
        return transient[index % CYCLE], True
    is_last = index % CYCLE == CYCLE - 1
    return (FAULTS[1 + index // CYCLE % (len(FAULTS) - 1)], False) if is_last else (NONE, True)


@pytest.mark.slow
def test_hundreds_of_judgements_none_wrong_none_lost_the_failed_marked(address):
    cases = [plan(index) for index in range(CYCLE * (len(FAULTS) - 1))]
    questions, truth = zip(*(asked(index, *case) for index, case in enumerate(cases)), strict=True)
    verdicts = judge_at(address, [ALL_IN_ONE]).score(questions)
    assert len(verdicts) == len(cases)
    for verdict, scores, (fault, passes_by) in zip(verdicts, truth, cases, strict=True):
        found = tuple(getattr(verdict, name) for name in FIELDS)
        if passes_by:
            assert (verdict.status, found) == ("ok", scores), (fault, verdict.failure)
        else:
            assert (verdict.status, found) == ("failed", (None,) * 4), fault
            assert verdict.failure
            assert len(verdict.requests) == (1 + RETRIES if fault in WORDS else 1)
        for request in verdict.requests:
            kept = [one["raw"] or one["failure"] for one in request["passes"]]
            assert all(kept), "every answer is kept, or why there is none"
    assert {fault for fault, passes_by in cases if not passes_by} == set(FAULTS[1:])


def test_what_is_wrong_with_an_answer_is_said_and_its_words_are_kept(address):
    verdicts = judge_at(address).score([asked(5000 + i, fault, False)[0] for i, fault in enumerate(sorted(WORDS))])
    said = dict(zip(sorted(WORDS), verdicts, strict=True))
    assert "no JSON object with the scores edit_success, overedit" in said["prose"].failure
    assert "I would say" in said["prose"].raw
    assert "overedit is 11, outside 0..10" in said["out of range"].failure
    assert "overedit is missing" in said["a score missing"].failure
    assert "NaN is no number" in said["NaN"].failure
    assert "finish_reason is 'length'" in said["length"].failure
    requests = [request for request in said["prose"].requests if request["rubric"] == "semantic consistency"]
    assert [request["attempt"] for request in requests] == [0, 1, 2]
    assert len({request["seed"] for request in requests}) == 3


def test_transport_faults_name_the_last_one(address):
    kinds = {"429": "HTTP 429", "HTML": "not JSON", "huge body": "more than 8388608 bytes", "400": "HTTP 400"}
    verdicts = judge_at(address).score([asked(6000 + i, fault, False)[0] for i, fault in enumerate(kinds)])
    for verdict, (fault, words) in zip(verdicts, kinds.items(), strict=True):
        assert words in verdict.failure, fault
        assert (" tries" in verdict.failure) == (fault != "400"), "what cannot pass is not tried again"


def test_the_model_that_is_not_there_is_named_with_what_is(address):
    model = OpenAIModel(address, "Qwen/other")
    with pytest.raises(EarlError, match=r"serves test/judge, not reward_function_api_model_name 'Qwen/other'"):
        model.ask([], lambda index, reply: None)


def test_a_server_that_never_comes_up_ends_in_an_error(tmp_path):
    with pytest.raises(EarlError, match=r"no judge server within 0\.2 s \(judge_startup_seconds\).*not there yet"):
        judge_at(str(tmp_path / "address"), startup=0.2).score([asked(0)[0]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EarlError, match="no connection"):
        judge_at(nowhere, startup=0.2).score([asked(0)[0]])


def test_a_server_that_comes_up_later_is_waited_for(address, tmp_path):
    later = tmp_path / "later"
    threading.Timer(0.3, lambda: later.write_text(Path(address).read_text())).start()
    (verdict,) = judge_at(str(later)).score([asked(7000)[0]])
    assert verdict.status == "ok"


def test_a_server_that_goes_away_and_does_not_come_back_ends_the_stage(tmp_path):
    path = tmp_path / "address"
    process = subprocess.Popen([sys.executable, faulty_server.__file__, str(path)])
    judge = judge_at(str(path), startup=1.0, timeout=60.0, concurrency=4)
    threading.Thread(target=lambda: (wait_for(path), time.sleep(0.5), process.kill()), daemon=True).start()
    # Slow answers keep every connection busy when the server dies.
    with pytest.raises(EarlError, match="no judge server within 1 s"):
        judge_at_once(judge, path)
    process.wait()


def judge_at_once(judge: ModelJudge, path: Path) -> None:
    wait_for(path)
    judge.score([asked(8000 + index, "slow", False)[0] for index in range(8)])


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_a_key_that_is_refused_stops_at_once():
    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await faulty_server.send(writer, 401, "no such key")
        writer.close()

    with serving(refuse) as url, pytest.raises(EarlError, match=r"HTTP 401: no such key.*EARL_JUDGE_API_KEY"):
        judge_at(url).score([asked(0)[0]])


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://a:1", "http://a:1/v1"),
        ("https://a/v1/", "https://a/v1"),
        ("node7:99", "http://node7:99/v1"),
        ("node7\n", "http://node7:4877/v1"),
    ],
)
def test_an_address_is_a_url_or_a_file_that_holds_a_host(tmp_path, text, url):
    (tmp_path / "host").write_text(text)
    assert address_of.resolve(str(tmp_path / "host")) == url
    if text.startswith("http"):
        assert address_of.resolve(text) == url


def test_a_file_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "host").write_text("two words")
    with pytest.raises(EarlError, match="host: should hold the judge server's address alone"):
        address_of.resolve(str(tmp_path / "host"))
