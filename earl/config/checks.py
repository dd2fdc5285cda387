"""What fields of a configuration must say together. What each may say by itself stands in `earl.config.schema`.

Every check raises a `pydantic_core.PydanticCustomError` that names a field, what is wrong and the remedy.
"""

from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from earl.config import address
from earl.statistics import rewards

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.config.sections import Sft

VLLM_TEMPERATURES = (0.01, 2.0)
"""vLLM refuses what lies above, and takes the lowest, without failing, for what lies below."""

IMAGE_START = "<|image start|>"
"""Prefill after which a completion is an image at once."""
LARGEST = 2**53 - 1
"""Largest whole number that Jsonnet, whose numbers are doubles, tells from its neighbours."""


def check_exact(number: Any) -> Any:
    """Refuse a whole number that Jsonnet may have rounded, so that no run has another seed than was written."""
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) > LARGEST:
        raise PydanticCustomError(
            "inexact",
            "is beyond {largest} (2^53 - 1), up to which Jsonnet keeps whole numbers exact; give a smaller one",
            {"largest": LARGEST},
        )
    return number


def check_path(path: str) -> str:
    """Refuse a path that begins with a tilde: only a shell expands it, and a folder of that name would be made."""
    if path.startswith("~"):
        raise PydanticCustomError("tilde", "begins with ~, which only a shell expands; write the home folder in full")
    return path


def wrong(field: str, message: str) -> PydanticCustomError:
    """An error of several fields together, filed under the first of them."""
    return PydanticCustomError("cross_field", "{message}", {"field": field, "message": message})


def check(config: "Config") -> None:
    """Raise where fields contradict each other."""
    _check_data(config)
    _check_iteration(config)
    _check_engine(config)
    _check_objective(config)
    _check_dynamic_sampling(config)
    _check_support(config)
    _check_learner(config)
    _check_learning_rate(config)
    _check_segment(config)
    _check_reward(config)
    _check_hub(config)


def check_coefficients(name: str, coefficients: list[float], paths_name: str, paths: list[str]) -> None:
    if len(coefficients) not in (0, len(paths)):
        raise wrong(
            name,
            f"has {len(coefficients)} values for {len(paths)} data sets in {paths_name}; "
            "give one for each, or an empty list to upsample all to the largest",
        )


def check_schedule(section: "Sft | Config", schedule: str, whole: str, unit: str) -> None:
    """Compare the fields of a learning rate's schedule.

    Args:
        section: has the fields.
        schedule: the name of the field that says how the rate falls.
        whole: the name of the field with the schedule's length; it may be null where that is of no interest.
        unit: of lengths, which the names of the others end in.
    """
    peak, final, shape, length = (
        getattr(section, name) for name in ("learning_rate", "final_learning_rate", schedule, whole)
    )
    warmup, decay = (getattr(section, f"{name}_{unit}") for name in ("warmup", "decay"))
    if shape == "constant":
        for name, value in (("final_learning_rate", final), (f"decay_{unit}", decay)):
            if value:
                raise wrong(name, f"is {value}, but {schedule} is `constant`; leave it out")
    if final > peak:
        raise wrong("final_learning_rate", f"is {final}, above learning_rate ({peak}), the peak; lower it")
    if length is not None and warmup > length:
        raise wrong(
            f"warmup_{unit}",
            f"is {warmup}, but there are {length} {unit}, so the learning rate would not reach its peak; lower it",
        )
    if length is not None and decay is not None and warmup + decay > length:
        raise wrong(
            f"decay_{unit}", f"is {decay}, but {warmup} of {length} {unit} warm up; lower it to {length - warmup}"
        )


def _check_learning_rate(config: "Config") -> None:
    check_schedule(config, "learning_rate_schedule", "schedule_iterations", "iterations")
    shape, length = config.learning_rate_schedule, config.schedule_iterations
    if shape != "constant" and length is None:
        raise wrong("schedule_iterations", f"is null, but learning_rate_schedule is `{shape}`, which needs its length")
    if shape == "constant" and length is not None:
        raise wrong("schedule_iterations", f"is {length}, but learning_rate_schedule is `constant`; leave it out")


def check_top_k(top_k: int) -> None:
    if top_k == 0:
        raise wrong("top_k", "is 0, which allows no token; -1 turns it off")


def _check_data(config: "Config") -> None:
    if not config.train_paths_file and config.num_iterations:
        raise wrong("train_paths_file", "is empty; name at least one tokenised data set, or set num_iterations to 0")
    check_coefficients("coefficients", config.coefficients, "train_paths_file", config.train_paths_file)
    if config.val_paths_file:
        check_coefficients("val_coefficients", config.val_coefficients, "val_paths_file", config.val_paths_file)
    elif without := [name for name, one in config.evaluations.items() if not one.paths_file]:
        raise wrong("val_paths_file", f"is empty, but evaluations draw their prompts from it: {', '.join(without)}")


def _check_iteration(config: "Config") -> None:
    if config.generations_per_sample == 1 and config.num_iterations:
        raise wrong(
            "generations_per_sample",
            "is 1, but an advantage compares the completions of a prompt: it is 0 everywhere and nothing is learned; "
            "set it to 2 or more (the paper's is 8), or set num_iterations to 0",
        )
    if config.episodes_per_iteration % config.generations_per_sample:
        raise wrong(
            "episodes_per_iteration",
            f"is {config.episodes_per_iteration}, not a multiple of "
            f"generations_per_sample ({config.generations_per_sample})",
        )
    batches = config.most_rollout_shards
    if config.rollout_shards > batches:
        size = f"of engine_batch_size ({config.engine_batch_size}) episodes; lower one of the two"
        parts = "prompts; lower it" if config.engine == "vllm" else f"{'batch' if batches == 1 else 'batches'} {size}"
        raise wrong("rollout_shards", f"is {config.rollout_shards}, but an iteration has only {batches} {parts}")
    check_top_k(config.top_k)
    if config.top_k == 1 and config.num_iterations:
        raise wrong(
            "top_k",
            "is 1, so all completions of a prompt are the same and none has an advantage; raise it, or set it to -1",
        )
    if config.train_text_tokens_only and config.train_vision_tokens_only:
        raise wrong("train_text_tokens_only", "and train_vision_tokens_only are both true; choose one")
    if config.train_text_tokens_only and config.text_only_steps and IMAGE_START in config.assistant_prefill:
        raise wrong(
            "train_text_tokens_only",
            f"is true, but assistant_prefill is `{config.assistant_prefill}`: the only text of a completion is then "
            "the size of its image, so nothing is learned; let assistant_prefill open the reasoning, or set this to "
            "false",
        )
    for kind in ("text", "vision"):
        steps, cycle = getattr(config, f"{kind}_only_steps"), getattr(config, f"{kind}_only_cycle_steps")
        if steps > cycle:
            raise wrong(f"{kind}_only_steps", f"is {steps}, longer than its cycle ({kind}_only_cycle_steps: {cycle})")


def _check_engine(config: "Config") -> None:
    if config.engine == "torch" and config.vllm_tensor_parallel_size > 1:
        raise wrong(
            "vllm_tensor_parallel_size",
            f"is {config.vllm_tensor_parallel_size}, but the engine `torch` computes on one device; set it to 1 or "
            "engine to `vllm`",
        )
    samples = {"generations_per_sample": config.generations_per_sample} if config.num_iterations else {}
    evaluations = config.evaluations.items()
    samples |= {f"evaluations.{name}.samples_per_prompt": one.samples_per_prompt for name, one in evaluations}
    for field, count in samples.items():
        if config.engine == "torch" and config.engine_batch_size % count:
            raise wrong(
                "engine_batch_size",
                f"is {config.engine_batch_size}, but {field} is {count}, and a prompt's samples are in one batch; make "
                f"it a multiple of {count}",
            )
    temperatures = {"temperature": config.temperature}
    temperatures |= {f"evaluations.{name}.temperature": one.temperature for name, one in config.evaluations.items()}
    for field, temperature in temperatures.items():
        lowest, highest = VLLM_TEMPERATURES
        if config.engine == "vllm" and not lowest <= temperature <= highest:
            raise wrong(field, f"is {temperature}, but the engine `vllm` samples at {lowest} to {highest}")


def _check_objective(config: "Config") -> None:
    ratio, correction = config.importance_ratio != "none", config.sampler_correction
    if ratio and correction == "truncate":
        raise wrong(
            "sampler_correction",
            f"is `truncate`, but importance_ratio is `{config.importance_ratio}`, which corrects for the sampler "
            "already: tokens would be weighed by the square of their ratio; turn one of the two off",
        )
    if config.kl_estimator == "weighted_k3" and config.kl_coeff > 0 and correction != "none":
        raise wrong(
            "kl_estimator",
            f"is `weighted_k3`, which weighs the KL term by ratios as they are, but sampler_correction is "
            f"`{correction}`, which does not trust them; set one of the two to `k3+` or `none`",
        )
    refresh = "reference_refresh_iterations"
    if config.reference_refresh_iterations is not None and config.kl_coeff == 0:
        raise wrong(refresh, "is set, but kl_coeff is 0, so there is no reference; raise kl_coeff, or leave this out")
    if config.reference_refresh_iterations is not None and config.lora is not None:
        raise wrong(
            refresh,
            "is set, but with lora the reference is the policy without its adapter, which never changes; leave one out",
        )
    steps = config.optimizer_steps_per_iteration
    if steps > config.most_trained_groups:
        raise wrong(
            "optimizer_steps_per_iteration",
            f"is {steps}, but an iteration is trained on only {config.most_trained_groups} groups; lower it",
        )
    if steps > 1 and not ratio and correction != "truncate":
        raise wrong(
            "optimizer_steps_per_iteration",
            f"is {steps}, but nothing corrects for episodes of an earlier policy from the second step on; set "
            "importance_ratio to `behavior` or sampler_correction to `truncate`",
        )
    for name in ("clip_ratio_low", "clip_ratio_high"):
        if getattr(config, name) is not None and not ratio:
            raise wrong(
                name, "is set, but importance_ratio is `none`; set it to `behavior` or `sequence`, or leave this out"
            )
    bounds = {"none": (), "truncate": ("high",), "filter": ("low", "high")}[correction]
    for side in ("low", "high"):
        name = f"sampler_correction_{side}"
        if (getattr(config, name) is not None) != (side in bounds):
            value = "null" if getattr(config, name) is None else getattr(config, name)
            verb = "needs it; give a value" if side in bounds else "has no use for it; leave it out"
            raise wrong(name, f"is {value}, but sampler_correction `{correction}` {verb}")


def _check_dynamic_sampling(config: "Config") -> None:
    wanted = config.dynamic_sampling
    if wanted is None:
        return
    if config.zero_variance_groups == "keep":
        raise wrong(
            "zero_variance_groups",
            "is `keep`, but dynamic_sampling trains on other groups in the place of those; set it to `mask`",
        )
    if wanted.usable_groups > config.most_prompts:
        raise wrong(
            "dynamic_sampling.usable_groups",
            f"is {wanted.usable_groups}, but an iteration has at most {config.most_prompts} groups; lower it, or raise "
            "max_rounds or prompts_per_round",
        )


def _check_support(config: "Config") -> None:
    """Which ids log-probs are over is said in one way only, and known where it is needed."""
    support, splits = config.resolved_logprob_support, config.separate_language_and_vision_vocabs
    apart = {"split_vocab": True, "full": False, "sampled": config.emu3_use_logit_processor}[support]
    if splits != apart:
        because = " without emu3_use_logit_processor" if support == "sampled" and not apart else ""
        raise wrong(
            "logprob_support",
            f"is `{support}`, which{because} {'keeps' if apart else 'does not keep'} text and visual ids apart, but "
            f"separate_language_and_vision_vocabs is {str(splits).lower()}; set that to {str(apart).lower()}",
        )
    if support == "sampled" and _truncates(config) and config.optimizer_steps_per_iteration > 1:
        raise wrong(
            "logprob_support",
            "is `sampled`, and what top_k and top_p had left is found from the policy that sampled, which is there for "
            "the first step only; set optimizer_steps_per_iteration to 1, or top_k to -1 and top_p to 1",
        )


def _truncates(config: "Config") -> bool:
    return config.top_k > 0 or config.top_p < 1


def _check_learner(config: "Config") -> None:
    for field, unfit in (("dtype", "float32"), ("device", "cpu")):
        if config.attention == "flash" and getattr(config, field) == unfit:
            raise wrong(
                "attention",
                f"is `flash`, which computes in bfloat16 on a GPU, but {field} is `{unfit}`; set it to `auto`",
            )
    if config.policy_dtype == "bfloat16" and config.dtype != "bfloat16":
        raise wrong(
            "policy_dtype",
            f"is `bfloat16`, but dtype is `{config.dtype}`: engines would sample from other weights than the learner "
            "computes with; set both to `bfloat16`",
        )
    if config.lora is not None and config.reference_offload:
        raise wrong(
            "reference_offload",
            "is true, but with lora the reference is the policy without its adapter, and there is no second copy to "
            "keep elsewhere; set it to false",
        )


def _check_segment(config: "Config") -> None:
    ranks, train = config.segment_processes, config.train_processes
    if ranks is not None and ranks < train:
        raise wrong(
            "segment_processes",
            f"is {ranks}, but the first train_processes ({train}) of them train; raise the former, lower the latter, "
            "or leave it out",
        )


def _check_reward(config: "Config") -> None:
    for score, (field, which) in rewards.needed(config).items():
        name = rewards.ASKED_BY[score]
        # A program gives every score, asked or not.
        if config.judge != "program" and not getattr(config, name):
            raise wrong(
                name,
                f"is false, but {field} needs {score} for `{which}`; set it to true, or train over what is stored with "
                "`earl replay`, where the stored scores hold it",
            )
    if config.judge == "openai" and config.reward_function_api_base is None:
        raise wrong("reward_function_api_base", "is missing, but the judge `openai` asks the server at this address")
    if config.reward_function_api_base is not None:
        try:
            address.check(config.reward_function_api_base)
        except ValueError as error:
            raise wrong("reward_function_api_base", str(error)) from error


def _check_hub(config: "Config") -> None:
    """A policy that is to be pushed stays on disk until it is, however long the hub is out of reach."""
    if config.push_to_hub and config.push_to_hub_repo_id is None:
        raise wrong("push_to_hub_repo_id", "is null, but push_to_hub is true; name a repository, or set it to false")
    push, name = config.push_to_hub_every_n_iterations, "keep_checkpoints_every_n_iterations"
    if config.keep_checkpoints_every_n_iterations is None:
        name = "save_checkpoints_every_n_iterations"
    keep = getattr(config, name)
    if config.push_to_hub and push is not None and (keep is None or push % keep):
        raise wrong(
            "push_to_hub_every_n_iterations",
            f"is {push}, but {name} ({keep}) does not keep these policies until they are pushed; make the former a "
            "multiple of the latter",
        )
