"""What the GPUs of a run's jobs hold, phase by phase.

A rank of a segment holds, one after another:

* while it samples, what the learner keeps between two steps, the engine awake, and the vision tokenizer with a batch;
* while it trains, the learner at its peak, what a sleeping engine keeps, and the vision tokenizer.

By stage each job has one of these to itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from earl.config import paths
from earl.estimate import cases, memory, models
from earl.estimate.gpus import Gpu
from earl.estimate.memory import EngineMemory, Memory

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.config.schema import Config

UPDATE = 1_500_000_000
"""What vLLM takes beyond its share while it is given new weights."""


@dataclass(frozen=True)
class Load:
    """What a GPU holds in one phase of a job.

    Attributes:
        what: the phase.
        parts: bytes by name.
    """

    what: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def rules(config: "Config", by_segment: bool) -> list[str]:
    """Return the rules that compute on GPUs, in the order in which they run."""
    shared = {stage.stage for output, stage in paths.shared_stages(config).items() if not output.exists()}
    found = [rule for rule, stage in (("tokenise", "tokenise"), ("sft", "sft")) if stage in shared]
    own = ["score"] if config.judge == "vllm" else []
    if config.num_iterations == 0:
        return found + (["generate", *own] if config.evaluations else [])
    return found + (["iterate"] if by_segment else ["generate", *own, "train"])


def of(config: "Config", rule: str, gpu: Gpu) -> list[Load]:
    """Return what the fullest GPU of a job holds, phase by phase.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    match rule:
        case "tokenise":
            return [_load("tokenise", memory.vision(config, models.vision(config), models.image_side(config)))]
        case "sft":
            return [_load(f"sft.{name}", fine_tuning(config, name)) for name in fine_tunings(config)]
        case "train" | "restore":
            return [_load("learner", learner(config))]
        case "generate":
            return [sampling(config, gpu, {})]
        case "score":
            return judge(config, gpu)
        case "iterate":
            return [*segment(config, gpu), *judge(config, gpu)]
    raise ValueError(f"{rule} is no rule that computes on GPUs")


def _load(what: str, found: Memory) -> Load:
    return Load(what, found.parts)


def learner(config: "Config") -> Memory:
    """Return what a step of RL takes of each rank's GPU."""
    return memory.learner(config, *_step(config))


def _step(config: "Config") -> tuple["Emu3TextConfig", int, int, int]:
    length = models.lengths(config)
    return models.text(config), config.train_processes, length.prompt, length.longest


def fine_tunings(config: "Config") -> list[str]:
    """Return the fine-tunings that are still to be made."""
    stages = paths.shared_stages(config).items()
    return [stage.name for output, stage in stages if stage.stage == "sft" and not output.exists()]


def fine_tuning(config: "Config", name: str) -> Memory:
    """Return what a step of a fine-tuning takes of each rank's GPU."""
    return memory.learner(config, *_tuning_step(config, name), config.sft[name])


def _tuning_step(config: "Config", name: str) -> tuple["Emu3TextConfig", int, int, int]:
    length, tuning = models.lengths(config), config.sft[name]
    image = length.prompt - models.WORDS
    longest = min(image + (models.REASONING if tuning.reasoning else 0), config.model_context_size - length.prompt)
    return models.text(config, tuning.base_model), config.train_processes, length.prompt, longest


def prepare(config: "Config", planned: Iterable[str]) -> None:
    """Simulate all that `of` of these rules asks for, in one process.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    cases.simulate(simulated(config, planned))


def simulated(config: "Config", planned: Iterable[str]) -> list[cases.Question]:
    """Return what is simulated for these rules."""
    wanted: list[cases.Question] = []
    for rule in planned:
        if rule in ("iterate", "train", "restore"):
            wanted += memory.learner_cases(config, *_step(config))
        if rule == "sft":
            for name in fine_tunings(config):
                wanted += memory.learner_cases(config, *_tuning_step(config, name), config.sft[name])
        if rule in ("iterate", "generate", "tokenise"):
            wanted.append(memory.vision_case(models.vision(config), models.image_side(config)))
    return wanted


def engine(config: "Config", gpu: Gpu) -> EngineMemory:
    """Return what an engine takes of a GPU that it has to itself."""
    return memory.engine(config, models.text(config), gpu.memory)


def sampling(config: "Config", gpu: Gpu, beside: dict[str, int], update: int = 0) -> Load:
    """Return what a GPU holds while it samples, with what is there beside, and what updating the engine takes."""
    sampled = engine(config, gpu)
    vision = memory.vision(config, models.vision(config), models.image_side(config))
    weights = vision.parts["vision"]
    # A batch of images, or an update of the engine's weights; not both at once.
    moment = max(vision.peak - weights, update)
    held = sampled.parts
    parts = {"engine": held["weights"], "cache": held["cache"], "logits": held.get("logits", 0)}
    return Load("sampling", beside | parts | {"vision": weights + moment, "overhead": held["overhead"]})


def segment(config: "Config", gpu: Gpu) -> list[Load]:
    """Return what a rank of a segment that samples and trains holds."""
    trained, sampled, text = learner(config), engine(config, gpu), models.text(config)
    vision = memory.vision(config, models.vision(config), models.image_side(config)).parts["vision"]
    resting = {name: trained.parts.get(name, 0) for name in ("weights", "moments", "reference")}
    # Of all weights the largest one is whole, in float32 and in bfloat16; an adapter is a few files.
    update = 0 if config.lora else UPDATE + 6 * text.vocab_size * text.hidden_size
    training = trained.parts | {"engine": sampled.at_rest, "vision": vision}
    return [sampling(config, gpu, resting, update), Load("training", training)]


def judge(config: "Config", gpu: Gpu) -> list[Load]:
    """Return what each GPU of the judge `vllm` holds; nothing of another judge, or one of unknown size."""
    found = memory.judge(config, gpu.memory)
    if found is None:
        return []
    return [Load("judge", {"judge" if name == "weights" else name: size for name, size in found.parts.items()})]
