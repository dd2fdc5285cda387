"""Where a judge server is said to be and how it is reached: mistakes end at once, in one line, without the key."""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl import doctor
from earl.config import address, load
from earl.doctor.wanted import Wanted
from earl.judges import server
from earl.judges.chat import Question
from earl.judges.openai_model import OpenAIModel
from earl.messages.errors import EarlError
from tests.support.faulty_server import MODEL, answered, scripted, serving

ROOT = Path(__file__).parents[2]
QUESTION = Question([{"role": "user", "content": "?"}], seed=7)
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
BASE = {
    "run_name": "a", "base_exp_dir": "runs", "model_path": "m", "vision_tokenizer_path": "v", "train_paths_file": ["x"],
    "val_paths_file": ["x"], "judge": "openai",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv(address.KEY, raising=False)


def ask(api_base: str) -> list[str | None]:
    found = []
    model = OpenAIModel(api_base, MODEL, timeout=5.0, startup=5.0, pause=(0.01, 0.05))
    model.ask([QUESTION], lambda index, reply: found.append(reply.error or reply.passes[0].text))
    return found


def refused(api_base: str) -> str:
    """What stops the client, which must not have waited for the server."""
    with pytest.raises(EarlError) as error:
        ask(api_base)
    assert "judge_startup_seconds" not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def answers(asked):
    return 200, answered("fine"), ""


class TestTheAddress:
    @pytest.mark.parametrize(
        ("text", "url"),
        [
            ("http://a:1", "http://a:1/v1"),
            ("https://a/v1/", "https://a/v1"),
            ("HTTPS://a", "https://a/v1"),
            ("https://ark.example/api/v3", "https://ark.example/api/v3"),
            ("https://g.example/v1beta/openai/", "https://g.example/v1beta/openai"),
            ("https://s.example/api/v1.0", "https://s.example/api/v1.0"),
            ("https://q.example/openai", "https://q.example/openai/v1"),
            ("http://a:1/v1/chat/completions", "http://a:1/v1"),
            ("http://a:1/judge", "http://a:1/judge/v1"),
            ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ],
    )
    def test_a_version_is_added_where_the_path_has_none(self, tmp_path, text, url):
        assert address.resolve(text) == url
        (tmp_path / "host").write_text(f"{text}\n")
        assert address.resolve(str(tmp_path / "host")) == url

    @pytest.mark.parametrize(
        ("text", "url"),
        [
            ("node7:99", "http://node7:99/v1"),
            ("node7", "http://node7:4877/v1"),
            ("::1", "http://[::1]:4877/v1"),
            ("[::1]", "http://[::1]:4877/v1"),
            ("[::1]:99", "http://[::1]:99/v1"),
            ("node7:99/api/v3", "http://node7:99/api/v3"),
        ],
    )
    def test_a_file_may_hold_less(self, tmp_path, text, url):
        (tmp_path / "host").write_text(text)
        assert address.resolve(str(tmp_path / "host")) == url

    @pytest.mark.parametrize(
        ("text", "remedy"),
        [
            ("myhost:8000", "http://myhost:8000"),
            ("localhost:8000", "http://localhost:8000"),
            ("10.0.0.1:8000/v1", "http://10.0.0.1:8000/v1"),
            ("[::1]:8000", "http://[::1]:8000"),
            ("htp://myhost", "http:// or https://"),
            ("http:/myhost", "http://host:port"),
            ("http://", "http://host:port"),
            ("http://myhost:port", "http://host:port"),
            ("http://::1:8000", "in brackets"),
            ("http://myhost?api-version=1", "leave it out"),
            (" ", "is empty; give the judge server's address"),
        ],
    )
    def test_what_is_no_address_is_refused_in_the_plan_and_by_the_client(self, tmp_path, text, remedy):
        path = tmp_path / "a.jsonnet"
        path.write_text(json.dumps(BASE | {"reward_function_api_base": text}))
        with pytest.raises(EarlError, match="field reward_function_api_base") as error:
            load.load(path)
        assert remedy in str(error.value)
        assert remedy in refused(text)

    def test_a_file_of_such_a_name_is_a_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "myhost:8000").write_text("http://a:1")
        assert address.resolve("myhost:8000") == "http://a:1/v1"

    def test_a_password_goes_into_no_configuration(self, tmp_path):
        path = tmp_path / "a.jsonnet"
        path.write_text(json.dumps(BASE | {"reward_function_api_base": "https://me:geheim@host/v1"}))
        with pytest.raises(
            EarlError, match=r"field reward_function_api_base holds a password.*EARL_JUDGE_API_KEY"
        ) as e:
            load.load(path)
        assert "geheim" not in str(e.value)

    def test_a_password_in_a_file_is_used_and_not_shown(self, tmp_path):
        seen = []
        with serving(scripted(lambda asked: seen.append(asked.headers) or (403, "no", ""))) as url:
            (tmp_path / "host").write_text(url.replace("://", "://me:geheim@"))
            said = refused(str(tmp_path / "host"))
        assert seen[0]["authorization"] == "Basic bWU6Z2VoZWlt"
        assert "HTTP 403" in said
        assert "geheim" not in said


class TestTheKey:
    @pytest.mark.parametrize("key", ["geheim\nzweite", "geheim\x00", "geheimü", "two geheim words"])
    def test_one_that_no_header_can_hold_is_refused_unseen(self, monkeypatch, key):
        monkeypatch.setattr(os, "environ", {**os.environ, address.KEY: key})
        with serving(scripted(answers)) as url:
            said = refused(url)
        assert "EARL_JUDGE_API_KEY" in said
        for part in ("geheim", "zweite"):
            assert part not in said

    def test_white_space_around_it_is_none_of_it(self, monkeypatch):
        monkeypatch.setenv(address.KEY, "geheim\n")
        seen = []
        with serving(scripted(lambda asked: seen.append(asked.headers) or answers(asked))) as url:
            assert ask(url) == ["fine"]
        assert seen[0]["authorization"] == "Bearer geheim"

    @pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
    def test_a_server_that_repeats_it_does_not_spread_it(self, monkeypatch, caplog, status):
        monkeypatch.setenv(address.KEY, "geheim-123")
        text = json.dumps({"error": {"message": "x" * 280 + "Incorrect API key provided: geheim-123", "code": status}})
        found = []
        with serving(scripted(lambda asked: (status, text, ""))) as url:
            model = OpenAIModel(url, MODEL, startup=5.0, patience=0.1, pause=(0.01, 0.05))
            try:
                model.ask([QUESTION], lambda index, reply: found.append(reply))
            except EarlError as error:
                found.append(error)
        assert len(found) == 1
        assert "geheim" not in f"{found} {found[0]} {caplog.text}"

    @pytest.mark.slow
    @pytest.mark.parametrize("key", ["geheim\nzweite", "geheimü"])
    def test_no_command_prints_it(self, tmp_path, key):
        command = [sys.executable, "-m", "earl", "doctor", "--path", str(tmp_path), "--judge", "http://127.0.0.1:9"]
        env = {**os.environ, "EARL_JUDGE_API_KEY": key, "PYTHONUTF8": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        output = done.stdout + done.stderr
        assert "EARL_JUDGE_API_KEY" in output
        assert "Traceback" not in output
        assert "geheim" not in output
        assert "zweite" not in output


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate that nobody signed, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    files = (folder / "certificate.pem", folder / "key.pem")
    done = subprocess.run([*command, "-addext", names, "-out", files[0], "-keyout", files[1]], capture_output=True)
    if done.returncode:
        pytest.skip("no openssl")
    return files


@pytest.fixture
def tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


class TestTheWay:
    def test_a_certificate_that_is_not_trusted(self, tls, certificate, monkeypatch):
        with serving(scripted(answers), tls) as url:
            said = refused(url)
            assert "certificate is not trusted (self-signed certificate)" in said
            assert "SSL_CERT_FILE" in said
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
            assert ask(url) == ["fine"]

    def test_http_where_https_is_spoken(self, tls):
        with serving(scripted(answers), tls) as url:
            assert "write https://" in refused(url.replace("https", "http"))

    def test_https_where_http_is_spoken(self):
        async def speak(reader, writer):
            await reader.read(5)
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        with serving(speak) as url:
            said = refused(url.replace("http", "https"))
        assert "nothing speaks https at this port; an http:// address?" in said

    @pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
    def test_a_socks_proxy_without_its_package(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv(name, "socks5://me:geheim@127.0.0.1:9")
        said = refused("http://127.0.0.1:9")
        assert f"{name}=socks5://" in said
        assert "pip install" in said
        assert "geheim" not in said
        passed, detail = (
            doctor.judge.check(Wanted(Path(), judge=None)),
            doctor.guarded("judge", lambda: judge_check()),
        )
        assert passed == (None, "no address was given")
        assert name in detail.detail

    @pytest.mark.parametrize("proxy", ["htp://127.0.0.1:9", "http://127.0.0.1:port"])
    def test_a_proxy_that_is_none(self, monkeypatch, proxy):
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert f"ALL_PROXY={proxy}" in refused("http://127.0.0.1:9")

    @pytest.mark.parametrize("status", [200, 302])
    def test_a_login_page_in_place_of_the_server(self, status):
        page = "<!DOCTYPE html><html><body>Sign in to go on</body></html>"
        to = "Location: https://login.example/?next=secret\r\n"
        with serving(scripted(lambda asked: (status, page, to), models=False)) as url:
            said = refused(url)
        assert "login page" in said
        assert "check reward_function_api_base" in said
        assert "next=secret" not in said

    def test_a_login_page_later_on(self):
        with serving(scripted(lambda asked: (302, "", "Location: https://login.example/\r\n"))) as url:
            assert "https://login.example/" in refused(url)


def judge_check():
    return doctor.judge.check(Wanted(Path(), judge="http://127.0.0.1:9"))


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_server_at_an_ipv6_address_writes_it_as_it_stands_in_a_url(tmp_path):
    program = "import http.server, socket, sys\n"
    program += "class S(http.server.HTTPServer): address_family = socket.AF_INET6\n"
    program += "class H(http.server.BaseHTTPRequestHandler):\n"
    program += "    def do_GET(self): self.send_response(200); self.end_headers()\n"
    program += "S(('::1', int(sys.argv[1])), H).serve_forever()\n"
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    serve = "import sys; from pathlib import Path; from earl.judges import server\n"
    serve += (
        "server.serve([sys.executable, '-c', sys.argv[1], sys.argv[2]], '::1', int(sys.argv[2]), Path(sys.argv[3]), 20)"
    )
    host_file = tmp_path / "host"
    started = subprocess.Popen([sys.executable, "-c", serve, program, str(port), str(host_file)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not host_file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert host_file.read_text() == f"http://[::1]:{port}\n"
        assert address.resolve(str(host_file)) == f"http://[::1]:{port}/v1"
    finally:
        started.terminate()
        started.wait(20)
    assert not host_file.exists()


def test_what_a_server_prints_is_lines_without_its_key(tmp_path):
    program = "import os, sys, time\nfor n in range(300): sys.stderr.write('\\rloading %d/300' % (n + 1))\n"
    program += "sys.stderr.write('\\nkey ' + os.environ['VLLM_API_KEY'] + '\\n'); sys.stderr.flush(); time.sleep(60)"
    serve = "import sys; from pathlib import Path; from earl.messages import console; from earl.judges import server\n"
    serve += "console.set_up(); server.serve([sys.executable, '-c', sys.argv[1]], '127.0.0.1', 1, None, 3.0)"
    env = {**os.environ, address.KEY: "geheim"}
    done = subprocess.run([sys.executable, "-c", serve, program], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stderr.splitlines()[:2] == ["loading 300/300", "key [hidden]"]


def test_the_servers_key_reaches_vllm_without_white_space(monkeypatch, tmp_path):
    monkeypatch.setenv(address.KEY, "geheim\n")
    monkeypatch.setattr(server, "_wait", lambda *arguments: None)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    shown = tmp_path / "shown"
    program = f"import os, pathlib; pathlib.Path({str(shown)!r}).write_text(os.environ['VLLM_API_KEY'])"
    assert server.serve([sys.executable, "-c", program], "127.0.0.1", 1, None, 5) == 0
    assert shown.read_text() == "geheim"
