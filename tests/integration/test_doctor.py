"""The doctor's findings, on this machine: alone, and as two ranks."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from earl.run import doctor

ROOT = Path(__file__).parents[2]


def found(wanted: doctor.Wanted) -> dict[str, tuple[bool | None, str]]:
    return {finding.check: (finding.passed, finding.detail) for _, finding in doctor.examine(wanted)}


def test_a_sound_node_passes_and_nothing_is_left(tmp_path):
    checks = found(doctor.Wanted(tmp_path / "runs", minimum_free=0))
    assert {name: passed for name, (passed, _) in checks.items()} == {
        "all reduce": None, "versions": True, "gpus": None, "disk": True, "clock": True, "shared files": True,
        "judge": None,
    }  # fmt: skip
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_missing_is_named(tmp_path):
    wanted = doctor.Wanted(tmp_path, gpus=64, judge=str(tmp_path / "judge.host"), minimum_free=2**60)
    checks = found(wanted)
    assert {name for name, (passed, _) in checks.items() if passed is False} == {"gpus", "disk", "judge"}
    assert "64 asked for" in checks["gpus"][1]
    assert "GiB free of 1073741824 GiB asked for" in checks["disk"][1]
    assert "judge.host: the file is not there yet" in checks["judge"][1]


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path):
    (tmp_path / "file").write_text("")
    checks = found(doctor.Wanted(tmp_path / "file" / "runs"))
    assert "file" in checks["disk"][1]
    assert [checks[name][0] for name in ("disk", "clock", "shared files")] == [False, False, False]


class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 200 if self.headers.get("Authorization") == "Bearer secret" else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "a-judge"}]}).encode())

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("key", "finding"), [("secret", (True, "a-judge")), ("", (False, "HTTP 401"))])
def test_the_judge_is_asked_what_it_serves(tmp_path, monkeypatch, key, finding):
    monkeypatch.setenv("EARL_JUDGE_API_KEY", key)
    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        passed, detail = doctor.judge(doctor.Wanted(tmp_path, judge=f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
    assert passed == finding[0]
    assert finding[1] in detail


@pytest.mark.slow
def test_ranks_are_checked_together(tmp_path):
    command = [sys.executable, "-m", "earl", "doctor", "--path", tmp_path, "--minimum-free", "0", "--processes", "2"]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert ["rank 0" in line for line in lines] == [True] * 7 + [False] * 7
    assert ["gloo, 2 ranks" in line for line in lines] == [True, *[False] * 6] * 2
    assert "FAILED" not in ended.stdout
