"""What a command prints: no secrets, no line for each request, and progress as whole lines where no terminal is."""

import io
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tqdm import tqdm

from earl.messages.console import SECONDS, Console
from earl.messages.errors import EarlError
from earl.messages.redaction import HIDDEN, redacted

ROOT = Path(__file__).parents[2]
KEY = "EARL_JUDGE_API_KEY"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://me:geheim@host:1/v1", "http://[hidden]@host:1/v1"),
        ("http://me:ge/heim@host", "http://[hidden]@host"),
        ("socks5://me:g@h@host, http://host:8000/a@b", "socks5://[hidden]@host, http://host:8000/a@b"),
        ("https://host/v1?key=abc&x=1", "https://host/v1?key=[hidden]&x=1"),
        ("https://host/v1?api-key=abc", "https://host/v1?api-key=[hidden]"),
        ("hf_abcdefghijklmnopqrst is no token", "[hidden] is no token"),
        ("key AIzaSyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q is not valid", "key [hidden] is not valid"),
        ("'ghp_16C7e42F292c6912E7710c838347Ae178B4a'", "'[hidden]'"),
        ("token=gho_16C7e42F292c6912E7710c838347Ae178B4a.", "token=[hidden]."),
        ("github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz0123456789", "[hidden]"),
        ("key_gsk_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6", "key_[hidden]"),
        ("AKIAIOSFODNN7EXAMPLE/20261125", "[hidden]/20261125"),
        ("sk-proj-a1B2c3D4_e5F6-g7H8 and sk-or-v1-0123456789abcdef", "[hidden] and [hidden]"),
        ("xai-a1B2c3D4e5F6g7H8i9J0k1, nvapi-a1B2c3D4e5F6g7H8i9J0-_k1", "[hidden], [hidden]"),
        ("Authorization: Bearer eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2Q", "Authorization: Bearer [hidden]"),
        ("{'jwt': 'eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2Q'}", "{'jwt': '[hidden]'}"),
        ("authorization: bearer a1b2c3d4e5f6g7h8i9==", "authorization: bearer [hidden]"),
    ],
)
def test_secrets_by_their_form(text, hidden):
    assert redacted(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/a/b@v1/c.parquet",
        "http://host:8000/v1",
        "http://[::1]:80/",
        "me@host",
        "a: b@c",
        "keys: 3 tokens",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "SHA256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
        "/data/hf_cache/models--org--name/snapshots/da39a3ee5e6b4b0d3255bfef95601890afd80709/x.json",
        "/runs/task-0123456789abcdef0123/sk-learn-feature-extraction/gsk_/AIza.py",
        "/data/sk-learn-features-v2-2025-11/x",
        "a bearer of bad news, Bearer authentication-is-needed",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize("variable", ["EARL_JUDGE_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY"])
@pytest.mark.parametrize("secret", ["geheim", "geheim\nzweite", 'geh"eim', "gehäim", "geheim/+=="])
def test_the_value_of_a_variable_in_every_spelling(monkeypatch, variable, secret):
    from urllib.parse import quote

    monkeypatch.setenv(variable, secret)
    for text in (secret, repr(secret), repr(secret.encode()), quote(secret), str(EarlError(f"a {secret} b"))):
        shown = redacted(text)
        assert HIDDEN in shown
        assert not any(part in shown for part in ("geh", "eim", "zweite"))


@pytest.mark.parametrize("value", ["", "x", "abc"])
def test_a_value_that_is_no_secret_garbles_nothing(monkeypatch, value):
    monkeypatch.setenv(KEY, value)
    assert redacted("abc x y") == "abc x y"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(write, clock=None) -> list[str]:
    stream = io.StringIO()
    console = Console(stream, clock or Clock())
    write(console)
    console.flush()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_bar_that_ends_soon_is_one_line():
    def write(console):
        for _ in tqdm(range(100), "sft", file=console, mininterval=0, miniters=1):
            pass
        print("done", file=console)

    bar, done = shown(write)
    assert bar.startswith("sft: 100%")
    assert done == "done"


def test_a_long_one_is_a_line_every_while_and_one_at_its_end():
    clock = Clock()

    def write(console):
        bar = tqdm(total=1000, desc="sft", file=console, mininterval=0, miniters=1)
        for _ in range(1000):
            clock.now += SECONDS / 100
            bar.update()
        bar.close()

    lines = shown(write, clock)
    assert 10 <= len(lines) <= 12
    assert all(line.startswith("sft:") and line.endswith("]") for line in lines)
    assert "1000/1000" in lines[-1]


def test_one_that_leaves_nothing_leaves_nothing_and_words_between_stand_alone():
    def write(console):
        bar = tqdm(total=10, desc="batch", leave=False, file=console, mininterval=0, miniters=1)
        bar.update()
        print("loss 3", file=console)
        console.write("loss 4\n")
        bar.update(9)
        bar.close()
        print("end", file=console)

    assert shown(write) == ["loss 3", "loss 4", "end"]


def test_two_bars_at_once_are_lines_too():
    def write(console):
        options = {"total": 3, "file": console, "mininterval": 0, "miniters": 1}
        one, two = tqdm(desc="one", position=0, **options), tqdm(desc="two", position=1, **options)
        for _ in range(3):
            one.update()
            two.update()
        two.close()
        one.close()

    lines = shown(write)
    assert {line.split(":")[0] for line in lines} == {"one", "two"}
    assert any(line.startswith("one: 100%") for line in lines)


def test_without_bars_words_stay_and_nothing_else():
    stream = io.StringIO()
    console = Console(stream)
    console.has_bars = False
    for leave in (True, False):
        with tqdm(range(3), file=console, mininterval=0, leave=leave) as bar:
            for _ in bar:
                pass
    console.write("iterate: 1 of 2\n")
    assert stream.getvalue() == "iterate: 1 of 2\n"


def test_text_without_an_end_comes_when_it_is_flushed():
    stream = io.StringIO()
    console = Console(stream)
    console.write("password? ")
    assert stream.getvalue() == ""
    console.flush()
    assert stream.getvalue() == "password? "


def test_a_key_in_two_pieces_is_one_key(monkeypatch):
    monkeypatch.setenv(KEY, "geheim")
    assert shown(lambda console: (console.write("a gehe"), console.write("im b\n"))) == ["a [hidden] b"]


def test_log_records_with_a_traceback_are_clean(monkeypatch):
    monkeypatch.setenv(KEY, "geheim")

    def write(console):
        logger = logging.Logger("x")
        logger.addHandler(logging.StreamHandler(console))
        try:
            raise ValueError("header geheim")
        except ValueError:
            logger.exception("it was %s", "geheim")

    assert "geheim" not in "\n".join(shown(write))


PROGRAM = """
import logging, sys
from earl.messages import console
console.set_up()
logging.getLogger("earl.judges").info("ours")
logging.getLogger("httpx2").info("HTTP Request: POST http://judge")
logging.getLogger("httpx2").warning("theirs")
from tqdm import tqdm
for _ in tqdm(range(50), "bar", mininterval=0, miniters=1): pass
raise RuntimeError("the key is geheim")
"""


def test_a_process_says_our_words_and_warnings_of_others():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, KEY: "geheim"}, capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stderr.splitlines()
    assert lines[:2] == ["ours", "theirs"]
    assert lines[2].startswith("bar: 100%")
    assert lines[3].startswith("Traceback")
    assert lines[-1] == "RuntimeError: the key is [hidden]"


def test_a_terminal_gets_bars_as_they_come():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    environment = {**os.environ, KEY: "geheim"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stderr=follower, cwd=ROOT)
    os.close(follower)
    output = b""
    try:
        while data := os.read(leader, 2**16):
            output += data
    except OSError:  # how a terminal ends
        pass
    process.wait()
    os.close(leader)
    assert output.count(b"\r") > 20
    assert b"[hidden]" in output
    assert b"geheim" not in output


def test_no_request_has_a_line_in_a_commands_log(tmp_path):
    """A real command, with the real client."""
    from tests.support.faulty_server import scripted, serving

    with serving(scripted(lambda asked: (404, "{}", ""))) as url:
        command = [
            sys.executable,
            "-m",
            "earl",
            "download",
            "hf://datasets/a/b/c.parquet",
            "--out",
            str(tmp_path / "o"),
        ]
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "HTTP Request" not in done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: hf://datasets/a/b/c.parquet: could not be downloaded:")
