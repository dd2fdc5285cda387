"""A hub that is not one, or not reached: downloading, converting and pushing each end in one line."""

import ssl
import sys

import pytest

from earl.config.load import read
from earl.data import hub_files
from earl.emu3 import published
from earl.files import hub_names as names
from earl.messages import network
from earl.messages.errors import EarlError
from earl.tracking import hub_push
from tests.support.faulty_server import scripted, serving
from tests.support.run_files import new_run, train

PAGE = "<!DOCTYPE html><html><body>Sign in</body></html>"
FILES = names.data_files("hf://datasets/osunlp/pairs/a.parquet")
PUSHED = {"push_to_hub": True, "push_to_hub_repo_id": "a/b", "push_to_hub_every_n_iterations": 1, "num_iterations": 1}


@pytest.fixture(autouse=True)
def own_hub(monkeypatch, tmp_path):
    import huggingface_hub

    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def use(tmp_path, what: str) -> None:
    if what == "download":
        hub_files.download(FILES, tmp_path / "out")
    elif what == "convert":
        published.located("BAAI/Emu3-Gen")
    else:
        run, _ = new_run(tmp_path / "a", **PUSHED, keep_checkpoints_every_n_iterations=1)
        train(run, 1)
        hub_push.push(run, read(run.config))


def said(monkeypatch, tmp_path, url: str, what: str) -> str:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    with pytest.raises(EarlError) as error:
        use(tmp_path, what)
    assert "\n" not in str(error.value)
    assert "geheim" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("what", ["download", "convert", "push"])
class TestEachWay:
    @pytest.mark.parametrize("redirects", [False, True])
    def test_a_login_page(self, monkeypatch, tmp_path, what, redirects):
        def respond(asked):
            if redirects and "login" not in asked.path:
                return 302, "", "Location: /login?next=1\r\n"
            return 200, PAGE, "Content-Type: text/html\r\n"

        with serving(scripted(respond, models=False)) as url:
            assert "a login page, or another server?" in said(monkeypatch, tmp_path, url, what)

    def test_no_https_at_the_port(self, monkeypatch, tmp_path, what):
        async def speak(reader, writer):
            await reader.read(5)
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        with serving(speak) as url:
            text = said(monkeypatch, tmp_path, url.replace("http", "https"), what)
        assert "nothing speaks https at this port" in text

    def test_a_socks_proxy_without_its_package(self, monkeypatch, tmp_path, what):
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv("ALL_PROXY", "socks5://me:geheim@127.0.0.1:9")
        text = said(monkeypatch, tmp_path, "http://127.0.0.1:9", what)
        assert "ALL_PROXY=socks5://" in text
        assert "pip install 'httpx2[socks]'" in text

    def test_a_token_that_no_header_holds(self, monkeypatch, tmp_path, what):
        monkeypatch.setenv("HF_TOKEN", "hf_geheimü")
        with serving(scripted(lambda asked: (200, "{}", ""), models=False)) as url:
            assert "not ASCII" in said(monkeypatch, tmp_path, url, what)


def test_reasons_are_found_however_deep_they_lie():
    deep = OSError("cannot find the snapshot\nplease try again")
    deep.__cause__ = ssl.SSLCertVerificationError(1, "unknown authority")
    assert network.reason(deep).startswith("its certificate is not trusted")
    deep.__cause__ = ConnectionRefusedError("refused")
    assert network.reason(deep) == "cannot find the snapshot please try again (refused)"
    assert network.reason(OSError("one\ntwo")) == "one two"
    assert network.reason(ValueError()) == "ValueError"
