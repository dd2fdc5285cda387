"""Every field of an experiment, with type, range, default and meaning; those of sections are in `earl.config.sections`.

Names, meanings and defaults are those of EARL's RL configuration where it has the field. A field either determines
results, and then it is part of the configuration's digest and frozen under a ``run_name``, or it is free to change
between two calls of the same run (`earl.config.fields.free`): how long to run, what to log and keep, where files lie.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, field_validator, model_validator

from earl.config import checks, defaults, references
from earl.config.fields import Coefficient, Integer, Name, Path, Positive, Section, fixed, free
from earl.config.sections import Curriculum, DynamicSampling, Evaluation, JudgeGate, Lora, RawDataset, Selection, Sft

RewardComponent = Literal[
    "semantic_consistency",
    "perceptual_quality",
    "edit_success",
    "overedit",
    "naturalness",
    "artifacts",
    "ground_score",
]


class Config(Section):
    """One experiment, resolved."""

    # Run and data
    run_name: Name = free(
        ...,
        "Name of the run: its folder is <base_exp_dir>/<run_name>; the same name resumes it. null: the name of the "
        "experiment's file.",
    )
    base_exp_dir: Path = free(..., "Folder of all runs and of the stages that they share.")
    train_paths_file: list[Path] = fixed(
        list,
        "Tokenised data sets to draw prompts from: `tokenized_datalist.json` files, Parquet files or folders, "
        "`stage:tokenise/<name>`, or `stage:fetch/<name>`, a published one by its name in `earl data list`.",
    )
    coefficients: list[Coefficient] = fixed(
        list,
        "Mixing, one for each data set: c >= 1 repeats it floor(c) times and adds a random fraction c - floor(c); "
        "c < 1 takes a random fraction c; an empty list upsamples every data set to the largest.",
    )
    val_paths_file: list[Path] = fixed(..., "Tokenised held-out data sets that evaluations draw prompts from.")
    val_coefficients: list[Coefficient] = fixed(lambda: [1.0], "Mixing of the held-out data sets, as `coefficients`.")
    raw_datasets: dict[Name, RawDataset] = fixed(
        dict, "Data sets that the pipeline tokenises, by the name that `stage:tokenise/<name>` uses."
    )
    random_seed: Integer = fixed(42, "Seed of everything random in RL and evaluation.", ge=0)

    # Models
    model_path: Path = fixed(
        "kazemnejad/Emu3-Base-SFT-got-Apr13_post_stochastic_256_lr1e-5-checkpoint-10800",
        "Starting policy, and frozen reference unless `reference_refresh_iterations` takes later ones: a folder, "
        "`stage:sft/<name>`, `stage:shapes-policy`, or a hub name, <owner>/<name>: a checkpoint that `earl convert "
        "model` takes; the pipeline converts it, once for all runs.",
    )
    model_revision: str | None = fixed(
        None, "Revision of `model_path` on the hub, a branch, tag or commit; null takes its main one.", min_length=1
    )
    tokenizer_path: Path = fixed(
        "BAAI/Emu3-Gen",
        "Tokenizer that policies from the hub are converted with: a folder, a hub name or `stage:shapes-policy`. A "
        "folder of a policy holds its own.",
    )
    vision_tokenizer_path: Path = fixed(
        "BAAI/Emu3-VisionTokenizer",
        "Emu3VQVAE that turns images into tokens and back: a folder, `package:<path>`, or a hub name of a format that "
        "`earl convert model` takes.",
    )
    image_area: Positive = fixed(
        65536, "Pixels that images are resized to before tokenising, keeping the aspect ratio: width x height."
    )
    sft: dict[Name, Sft] = fixed(
        dict,
        "Supervised fine-tunings by name. Made are those that `model_path` names as `stage:sft/<name>`, and those that "
        "they start from.",
    )
    selections: dict[Name, Selection] = fixed(
        dict,
        "Selections from the rollouts of runs, by the name that `stage:select/<name>` uses in `train_paths_file` of a "
        "fine-tuning.",
    )
    assistant_prefill: str = fixed(
        " Let's think step by step. <|start thinking|>",
        "Text that every completion starts from: this one forces reasoning, `<|image start|>` an image at once. "
        "`{H}` and `{W}` stand for the height and width of the original image in visual tokens.",
    )

    # Training
    learning_rate: float = fixed(3e-6, "Learning rate of AdamW; its peak where it changes.", gt=0)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = fixed(
        "constant",
        "How the rate goes after its warm-up: `linear` and `cosine` fall to `final_learning_rate` by the end of "
        "iteration `schedule_iterations`, and it stays there.",
    )
    final_learning_rate: float = fixed(0.0, "Learning rate that `linear` and `cosine` fall to.", ge=0)
    schedule_iterations: Positive | None = fixed(
        None, "Iterations that `linear` and `cosine` are spread over, whatever `num_iterations` is."
    )
    decay_iterations: Positive | None = fixed(
        None, "Last ones of `schedule_iterations`, over which the rate falls; null: all after the warm-up."
    )
    warmup_iterations: Integer = fixed(
        0, "Iterations over which the learning rate rises linearly to `learning_rate`.", ge=0
    )
    num_iterations: Integer = free(
        2000,
        "Iterations of the whole run; raising it continues a finished run. 0: no RL; data and fine-tunings are made, "
        "and the starting policy is evaluated.",
        ge=0,
    )
    advantage: Literal["mean_std", "mean", "leave_one_out"] = fixed(
        "mean_std",
        "Advantage within a group: `mean_std` is (reward - mean) / std (GRPO), `mean` is reward - mean (Dr. GRPO), so "
        "that groups count by how much their rewards differ, `leave_one_out` is reward - mean of the others (RLOO).",
    )
    advantage_components: dict[RewardComponent, Coefficient] = fixed(
        dict,
        "Components of the reward, with a weight each, whose `advantage` is computed one by one, weighed, summed and "
        "divided by the iteration's standard deviation (GDPO, Liu et al. 2026); none: that of the reward. "
        "`semantic_consistency` is min(edit_success, overedit), `perceptual_quality` min(naturalness, artifacts), the "
        "others are sub-scores; all are 0 where there is no finished image.",
    )
    zero_variance_groups: Literal["keep", "mask"] = fixed(
        "keep",
        "Groups whose rewards are all equal, so that they have no advantage: `keep` them in the step, where their "
        "tokens count in the KL term and in what the loss is divided by; `mask` them out of it (DAPO, arXiv "
        "2503.14476). `dynamic_sampling` samples others in their place.",
    )
    kl_coeff: float = fixed(
        0.0003, "Weight of the estimate of KL(policy || reference) in the loss; 0: none, no reference is loaded.", ge=0
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "weighted_k3"] = fixed(
        "k3",
        "Estimate of the KL by d = reference - policy log-prob (Schulman 2020): `k1` is -d, which has no gradient on "
        "average, `k2` is d^2 / 2, `k3` is exp(d) - 1 - d (GRPO). With an unbiased gradient: `k3+` has the value of k3 "
        "and the gradient of k2 (verl); `weighted_k3` is k3 times the ratio of policy to sampler, and unbiased for an "
        "older policy's episodes too (DeepSeek-V3.2).",
    )
    reference_refresh_iterations: Positive | None = fixed(
        None,
        "Take the policy as the new reference of the KL term after every n-th iteration (TRL: `ref_model_sync_steps`); "
        "null: the reference is the starting policy throughout.",
    )
    entropy_coeff: float = fixed(
        0.0,
        "Weight of the entropy of counted tokens, which the loss is lowered by, so that the policy keeps exploring "
        "(TRL: `entropy_coef`): exact, over `logprob_support` at `temperature`. 0: none.",
        ge=0,
    )
    loss_normalization: Literal["tokens", "sequences", "constant"] = fixed(
        "tokens",
        "What the loss of an optimizer step is divided by: `tokens`, its completion tokens (DAPO); `sequences`, each "
        "episode by its length and then by their number (GRPO's paper); `constant`, episodes x `max_response_tokens` "
        "(Dr. GRPO). In a text-only or vision-only iteration the first two count tokens of that kind alone.",
    )
    optimizer_steps_per_iteration: Positive = fixed(
        1, "Mini-batches of whole groups that an iteration is cut into, one optimizer step on each."
    )
    importance_ratio: Literal["none", "behavior", "sequence"] = fixed(
        "none",
        "`behavior`: PPO's surrogate, whose ratio is to the log-probs of the sampler, token by token; `sequence`: the "
        "same with the geometric mean over each completion (GSPO, with loss_normalization `sequences`); `none`: the "
        "policy gradient, as if every episode came from the policy that takes the step. CISPO is `none` with "
        "sampler_correction `truncate`.",
    )
    clip_ratio_low: float | None = fixed(
        None, "importance_ratio: clips it at 1 - this (PPO: 0.2, GSPO: 3e-4); null does not clip there.", gt=0, le=1
    )
    clip_ratio_high: float | None = fixed(
        None,
        "importance_ratio: clips it at 1 + this (PPO: 0.2, DAPO: 0.28, GSPO: 4e-4); null does not clip there.",
        gt=0,
    )
    sampler_correction: Literal["none", "truncate", "filter"] = fixed(
        "none",
        "For log-probs of sampler and learner that differ: `truncate` weighs each token by their ratio, at most "
        "`sampler_correction_high` (truncated importance sampling, Yao et al. 2025); `filter` leaves out sequences "
        "whose ratios' geometric mean is outside `sampler_correction_low`..`sampler_correction_high`.",
    )
    sampler_correction_low: float | None = fixed(None, "Lower bound of `filter`.", gt=0, le=1)
    sampler_correction_high: float | None = fixed(None, "Upper bound of `truncate` (2 is common) and `filter`.", ge=1)
    parity_tolerance: float | None = fixed(
        0.05,
        "Before an iteration's first step, log-probs of sampler and learner may differ by this many nats a token on "
        "average, else training stops and prints both; about 1e-6 in float32 and 0.01 in bfloat16 are usual; null: no "
        "check.",
        gt=0,
    )
    temperature: float = fixed(1.0, "Sampling temperature; the learner divides logits by it too.", gt=0)
    per_device_batch_size: Positive = fixed(8, "Episodes in a micro-batch of the learner, on each of its processes.")
    train_processes: Positive = free(
        1,
        "Processes that the policy is trained by, in RL and fine-tuning, which split it, each on a GPU of its own: "
        "torchrun starts them. The same step within rounding; metrics.json says how many there were.",
    )
    lora: Lora | None = fixed(
        None,
        "RL trains an adapter, some MB in `policy/`, and the starting policy stays as it is: base of every iteration's "
        "adapter, and reference, of which no second copy is held. null: RL trains all weights.",
    )
    reference_offload: bool = free(
        False, "Keep the reference model in main memory, and take a layer at a time to the GPU."
    )
    gradient_checkpointing: bool = free(
        True,
        "Keep the input of each layer alone, and compute the layer again in the backward pass: less memory, more work, "
        "the same step.",
    )
    attention: Literal["auto", "sdpa", "flash"] = free(
        "auto",
        "Kernel of the learner's attention: torch's own, or the package flash-attn 2 on a GPU in bfloat16, which "
        "`auto` takes where it can be imported.",
    )
    compile: bool = free(False, "Compile norms and MLPs of the learner's layers (torch.compile); needs a compiler.")
    policy_dtype: Literal["float32", "bfloat16"] = fixed(
        "float32",
        "Type of the weights in `policy/`, which engines sample from. The learner updates float32 weights in any case: "
        "with `bfloat16`, half the size, they stand in `trainer/`.",
    )
    packing: Literal["none", "groups"] = fixed(
        "none",
        "`groups`: a micro-batch of the learner is one row without padding, in which the completions of a prompt share "
        "it; `none`: one padded row an episode. The same loss and gradient within rounding, in RL and fine-tuning.",
    )
    train_text_tokens_only: bool = fixed(
        False, "Train text tokens in the first `text_only_steps` iterations of each cycle, visual ones in the rest."
    )
    text_only_cycle_steps: Positive = fixed(10, "Length of a cycle of `train_text_tokens_only`, in iterations.")
    text_only_steps: Integer = fixed(10, "Iterations of each cycle that train text tokens alone.", ge=0)
    train_vision_tokens_only: bool = fixed(
        False, "Train visual tokens in the first `vision_only_steps` iterations of each cycle, all tokens in the rest."
    )
    vision_only_cycle_steps: Positive = fixed(10, "Length of a cycle of `train_vision_tokens_only`, in iterations.")
    vision_only_steps: Integer = fixed(10, "Iterations of each cycle that train visual tokens alone.", ge=0)

    # Generation
    curriculum: Curriculum | None = fixed(
        None,
        "Which prompts iterations pass over, their last groups in this run having been of no use; null: none. It "
        "changes nothing while no prompt comes again within `rest_iterations`.",
    )
    episodes_per_iteration: Positive = fixed(128, "Episodes in an iteration: prompts x `generations_per_sample`.")
    generations_per_sample: Positive = fixed(
        8, "Completions for each prompt, the group that advantages are relative to."
    )
    dynamic_sampling: DynamicSampling | None = fixed(
        None,
        "Sample further prompts while too few groups have rewards that differ (DAPO); null: an iteration has "
        "`episodes_per_iteration`, whatever their rewards.",
    )
    max_response_tokens: Positive = fixed(
        2048,
        "Longest completion in tokens; cut there, or where `model_context_size` ends, its finish_reason is `length`.",
    )
    max_prompt_len: Positive | None = fixed(
        None, "Longest prompt, in tokens; null: as long as `model_context_size` has room for. See `long_prompts`."
    )
    long_prompts: Literal["leave_out", "stop"] = free(
        "leave_out",
        "Prompts of training that are longer than `max_prompt_len`, or whose edited image, of their image's size, does "
        "not fit in `max_response_tokens` or what they leave of `model_context_size`. `leave_out`: the next draw takes "
        "their place, and "
        "`left_out_prompts` of metrics.json counts them; `stop`: iteration 1 looks at all prompts before it samples, "
        "and the run stops. Evaluations always stop; a fine-tuning does the same with sequences longer than "
        "`model_context_size`, which `sft.json` counts.",
    )
    max_completion_len: Positive | None = fixed(
        None, "Longest completion that the learner takes, in tokens; null: as long as they come."
    )
    top_p: float = fixed(1.0, "Nucleus sampling; 1 turns it off.", gt=0, le=1)
    top_k: Integer = fixed(-1, "Sample among the k likeliest tokens; -1 turns it off.", ge=-1)
    model_context_size: Positive = fixed(4096, "Longest sequence, prompt and completion together, in tokens.")
    emu3_use_logit_processor: bool = fixed(True, "Constrain completions to the grid of the original image.")
    separate_language_and_vision_vocabs: bool = fixed(
        True,
        "Normalise the log-probability of a visual token over visual ids, of any other over the ids below the first "
        "visual one.",
    )
    logprob_support: Literal["sampled", "split_vocab", "full"] | None = fixed(
        None,
        "Ids that the learner normalises log-probabilities over. `split_vocab`: as "
        "`separate_language_and_vision_vocabs` says; `full`: all of the model's; `sampled`: those that the sampler "
        "drew from, by `emu3_use_logit_processor`, `top_k` and `top_p`, the latter two found again from the learner's "
        "own logits; null: `split_vocab` or `full` by `separate_language_and_vision_vocabs`.",
    )
    engine: Literal["vllm", "torch"] = fixed("vllm", "Rollout engine.")
    engine_batch_size: Positive = fixed(
        32,
        "Completions in a batch of the torch engine, always this many, so that results do not depend on shards; its "
        "shards are cut at multiples of this. vLLM batches by itself, and its shards are cut between any two prompts.",
    )
    rollout_shards: Positive = free(
        1,
        "Parts that the prompts of an iteration, or of a further round of `dynamic_sampling`, are generated and scored "
        "in, in parallel.",
    )
    vllm_gpu_memory_utilization: float = free(
        0.3,
        "Share of GPU memory that vLLM takes for weights and cache; of main memory for its cache on a CPU.",
        gt=0,
        le=1,
    )
    vllm_tensor_parallel_size: Positive = free(1, "GPUs that vLLM splits the policy over; the torch engine takes one.")
    device: Literal["auto", "cpu", "cuda"] = free(
        "auto",
        "Where models run. `auto` takes a GPU where there is one, and is an error where there are some that torch does "
        "not see.",
    )
    dtype: Literal["float32", "bfloat16"] = fixed("bfloat16", "Type that models compute in.")
    cpu_threads: Positive = fixed(
        2, "Threads of each stage; fixed, since sums over another number of threads differ in the last bits."
    )

    # Reward
    judge: Literal["openai", "vllm", "program"] = fixed(
        "openai", "Who scores: a server, vLLM in the process, or the shapes world's own program."
    )
    reward_function_api_base: Path | None = free(
        None,
        "Address of the judge server, needed by the judge `openai`: http://<host>:<port>, or a file that holds it, "
        "which may appear later.",
    )
    reward_function_api_model_name: Path = fixed(
        "Qwen/Qwen2.5-VL-72B-Instruct",
        "Model that judges: a hub name or a folder; for `openai`, the server's name of it.",
    )
    reward_function_api_model_revision: str | None = fixed(
        None,
        "Revision of that model: the judge `vllm` loads it, every judge records it and keeps its answers by it; null "
        "takes the main one. Of a server of your own, any text that changes with what answers there.",
    )
    reward_compute_viescore: bool = fixed(True, "Ask the judge model for semantic consistency and perceptual quality.")
    reward_compute_ground_score: bool = fixed(False, "Ask the judge model to compare with the ground-truth edit.")
    reward_final_reward: Literal["viescore", "ground_score", "sqrt(viescore_pqxground_score)"] = fixed(
        "viescore", "Score that becomes the reward, 0..10."
    )
    judge_rubric_semantic_consistency: Path = fixed(
        "package:judges/rubrics/semantic_consistency.jsonnet",
        "Rubric that gives edit_success and overedit: a file of the form that earl/judges/rubric.py describes.",
    )
    judge_rubric_perceptual_quality: Path = fixed(
        "package:judges/rubrics/perceptual_quality.jsonnet", "Rubric that gives naturalness and artifacts."
    )
    judge_rubric_ground_score: Path = fixed(
        "package:judges/rubrics/ground_score.jsonnet", "Rubric that gives ground_score."
    )
    judge_samples: Integer = fixed(
        1, "Answers to each question, from one reading of the prompt; a score is their mean.", ge=1, le=64
    )
    judge_readout: Literal["sampled", "expected"] = fixed(
        "sampled",
        "Score of an answer: the number it gives, or the mean over the distribution that this number was drawn from; "
        "the latter needs a server that gives log-probabilities.",
    )
    judge_retries: Integer = fixed(
        3, "Times that an answer without usable scores is asked for again, with a new seed each.", ge=0, le=20
    )
    judge_temperature: float = fixed(1.0, "Sampling temperature of the judge; 0 makes all answers alike.", ge=0, le=2)
    judge_max_tokens: Positive = fixed(512, "Longest answer, in tokens.")
    judge_reasoning_length: Positive = fixed(
        300, "Longest reasoning before the scores, in characters, where the server keeps to a schema."
    )
    judge_image_size: Positive | None = fixed(
        None, "Longer side that images are resized to before a model judges them, in pixels; null: as they are decoded."
    )
    judge_structured_output: bool = fixed(
        True, "Hold answers to a JSON schema; false for a server that knows none, whose answers are read tolerantly."
    )
    judge_concurrency: Positive = free(
        64,
        "Questions that are under way at once, of each process and for the judge `openai`; fewer where the server is "
        "overloaded.",
    )
    judge_timeout_seconds: float = free(120.0, "Seconds that a server may take for one question.", gt=0)
    judge_retry_seconds: float = free(
        300.0,
        "Seconds after which the judge `openai` gives up a question whose tries all fail, and a server that has time "
        "for none. Waiting for a turn does not count.",
        gt=0,
    )
    judge_startup_seconds: float = free(1800.0, "Seconds to wait for a server to come up.", gt=0)
    judge_tensor_parallel_size: Positive = free(
        defaults.judge_gpus,
        "GPUs that the judge `vllm` is split over; by default 1, 2, 4 or 8, so that the weights of a model with that "
        "number in its name, such as 72B, take at most half of an 80 GB GPU.",
    )
    judge_context_size: Positive = free(4096, "Longest question and answer together in the judge `vllm`, in tokens.")
    judge_gpu_memory_utilization: float = free(
        0.9,
        "Share of the memory of each of its GPUs that the judge `vllm` takes. It has them to itself: lower this where "
        "processes that are not EARL's use them, too.",
        gt=0,
        le=1,
    )
    judge_cache: bool = free(
        True, "Keep answers in <base_exp_dir>/shared/judgements.sqlite, so that what is identical is asked once."
    )
    judge_gate: JudgeGate | None = free(
        None, "What the judge must reach on pairs with a known order before RL starts; null: nothing is checked."
    )
    max_failed_fraction: float = free(
        0.05, "Share of an iteration's episodes that the judge may fail on before the iteration stops.", ge=0, le=1
    )

    # Evaluation, logging, checkpoints
    evaluations: dict[Name, Evaluation] = free(dict, "Held-out evaluations by name.")
    segment_length: Positive = free(
        50, "Iterations of one segment: one program (`earl iterate`) that keeps its models in memory."
    )
    segment_processes: Positive | None = free(
        None,
        "Ranks of a segment. Each samples with an engine of its own, on a GPU of its own; the first `train_processes` "
        "of them train. At least `train_processes`; null: `train_processes`.",
    )
    segment_checkpoint_every_n_iterations: Positive = free(
        25,
        "Iterations after which a segment writes a checkpoint. It also writes one at its end, and those that "
        "`save_checkpoints_every_n_iterations` and `keep_checkpoints_every_n_iterations` keep. After a crash it trains "
        "again from the newest one, over stored rollouts and scores.",
    )
    log_episodes_every_n_iterations: Positive = free(
        5, "Iterations whose episodes, with their pictures, `earl track` shows; all of them are on disk."
    )
    keep_checkpoints_every_n_iterations: Positive | None = free(
        100,
        "Keep the checkpoint of every n-th iteration for good; null: all that `save_checkpoints_every_n_iterations` "
        "saves.",
    )
    save_checkpoints_every_n_iterations: Positive | None = free(
        100,
        "Save a checkpoint every n-th iteration. The latest is kept; older ones are deleted unless "
        "`keep_checkpoints_every_n_iterations` keeps them. null: none but those of the last two iterations.",
    )
    wandb_mode: Literal["disabled", "offline", "online"] = free(
        "disabled",
        "Weights & Biases: `online` sends as the run goes on, `offline` writes a folder for `wandb sync` at the end; "
        "both need wandb: pip install -e '.[tracking]' in EARL's folder.",
    )
    wandb_project: Name = free("earl", "Project of the run's page on Weights & Biases.")
    wandb_entity: str | None = free(None, "User or team whose project it is; null: wandb's own default.", min_length=1)
    wandb_every_n_iterations: Positive = free(10, "online: iterations between two sends while the run goes on.")
    push_to_hub: bool = free(False, "Push policies to the Hugging Face hub; needs a token.")
    push_to_hub_every_n_iterations: Positive | None = free(
        100, "Policies of every n-th iteration and of the last are pushed; null: of the last alone."
    )
    push_to_hub_repo_id: Path | None = free(
        lambda data: f"imged_rl__{data.get('run_name', '')}",
        "Repository on the hub, <owner>/<name>; without an owner, the token's user. Made when it is missing. null: "
        "nothing is pushed.",
    )
    push_to_hub_exports: bool = free(
        False,
        "Push what `earl export` writes, with vision tokenizer, processor and model card, in place of policy folders; "
        "an adapter is added to its base. Until it is pushed, an export takes its room in `<run>/tracking/`.",
    )
    push_to_hub_private: bool = free(True, "Whether a repository that is made is private.")

    @field_validator("reward_function_api_base", mode="before")
    @classmethod
    def _none_is_null(cls, value: Any) -> Any:
        """The reference takes the text "NONE" for null, so that a variable can say it."""
        return None if isinstance(value, str) and value.lower() == "none" else value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        checks.check(self)
        references.check(self)
        return self

    @property
    def resolved_logprob_support(self) -> str:
        return self.logprob_support or ("split_vocab" if self.separate_language_and_vision_vocabs else "full")

    def prefill(self, evaluation: str) -> str:
        """Return the text that completions of an evaluation start from."""
        own = self.evaluations[evaluation].assistant_prefill
        return self.assistant_prefill if own is None else own

    def evaluations_at(self, index: int) -> list[str]:
        """Return the evaluations of the policy of iteration ``index``: every n-th one, from 0 on, and the last."""
        is_last = index == self.num_iterations
        return [name for name, one in self.evaluations.items() if is_last or index % one.every_n_iterations == 0]

    @property
    def prompts_per_iteration(self) -> int:
        return self.episodes_per_iteration // self.generations_per_sample

    @property
    def rounds(self) -> int:
        """Rounds that an iteration may sample: one, and the further ones of `dynamic_sampling`."""
        return 1 + (self.dynamic_sampling.max_rounds if self.dynamic_sampling else 0)

    def prompts_of_round(self, number: int) -> range:
        """Return the indices within the iteration of the prompts of a round, from 0 on."""
        first = self.prompts_per_iteration
        if number == 0 or self.dynamic_sampling is None:
            return range(first)
        size = self.dynamic_sampling.prompts_per_round or first
        return range(first + (number - 1) * size, first + number * size)

    @property
    def most_prompts(self) -> int:
        """Prompts of an iteration that samples all of its rounds."""
        return self.prompts_of_round(self.rounds - 1).stop

    @property
    def most_episodes(self) -> int:
        return self.most_prompts * self.generations_per_sample

    @property
    def most_trained_groups(self) -> int:
        """Groups that an iteration is trained on at most."""
        return self.dynamic_sampling.usable_groups if self.dynamic_sampling else self.prompts_per_iteration

    @property
    def rollout_files(self) -> int:
        """Files that the rollouts of an iteration are in: `rollout_shards` a round, also of one that is not needed."""
        return self.rollout_shards * self.rounds

    def in_files(self, files: int) -> Self:
        """Return the configuration with the `rollout_shards` that an iteration of so many files was made in."""
        return self.model_copy(update={"rollout_shards": files // self.rounds})

    @property
    def prompts_per_batch(self) -> int:
        """Prompts at whose multiples an iteration is cut into shards: those of an engine's batch."""
        return 1 if self.engine == "vllm" else max(1, self.engine_batch_size // self.generations_per_sample)

    @property
    def most_rollout_shards(self) -> int:
        """Shards that an iteration can be cut into: each holds whole batches of whole groups."""
        return -(-self.prompts_per_iteration // self.prompts_per_batch)


def is_free(field: str, model: type[BaseModel] = Config) -> bool:
    """Return whether a top-level field may change under the same run name."""
    return bool(model.model_fields[field].json_schema_extra["free"])
