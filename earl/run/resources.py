"""What a job takes by the configuration, unless a profile says something else."""

from earl.config.schema import Config
from earl.run import segments


def ranks(config: Config, rule: str) -> int:
    """Return how many processes a job computes in."""
    trains = rule in ("train", "sft", "restore")
    return segments.processes(config) if rule == "iterate" else config.train_processes if trains else 1


def threads(config: Config, rule: str) -> int:
    return config.cpu_threads * ranks(config, rule)


def gpus(config: Config, rule: str) -> int:
    """Return the GPUs of a job: one a rank, and those that an engine or a judge is split over."""
    judge = config.judge_tensor_parallel_size if config.judge == "vllm" else 0
    engine = config.vllm_tensor_parallel_size if config.engine == "vllm" else 1
    wanted = {"generate": engine, "score": judge, "iterate": ranks(config, rule) + judge}
    return 0 if config.device == "cpu" else wanted.get(rule, ranks(config, rule))
