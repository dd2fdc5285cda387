"""What jobs need by the configuration, where a profile says nothing else: GPUs and processor cores."""

from earl.config.schema import Config
from earl.run import segments


def sampling_gpus(config: Config) -> int:
    return _on_gpus(config, config.vllm_tensor_parallel_size if config.engine == "vllm" else 1)


def judging_gpus(config: Config) -> int:
    """None where the judge is a server or a program."""
    return _on_gpus(config, config.judge_tensor_parallel_size if config.judge == "vllm" else 0)


def training_gpus(config: Config) -> int:
    return _on_gpus(config, config.train_processes)


def segment_gpus(config: Config) -> int:
    return _on_gpus(config, segments.processes(config)) + judging_gpus(config)


def tokenising_gpus(config: Config) -> int:
    return _on_gpus(config, 1)


def training_threads(config: Config) -> int:
    return config.cpu_threads * config.train_processes


def segment_threads(config: Config) -> int:
    return config.cpu_threads * segments.processes(config)


def _on_gpus(config: Config, count: int) -> int:
    return 0 if config.device == "cpu" else count
