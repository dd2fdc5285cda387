// What all ten experiments of the paper share. Fields left out have the defaults of earl/config/schema.py.
{
  run_name: std.extVar('APP__RUN_NAME'),
  base_exp_dir: std.extVar('APP__BASE_EXP_DIR'),
  val_paths_file: [$.validation],
  val_coefficients: [1.0],

  // Hidden fields, which other files use and --set can change: whether to make SFT models instead of taking published
  // ones, where the data lie, and what the fine-tunings in models/ have in common. `earl data fetch experiments --to
  // $APP__DATA_DIR` puts the data there; data/fetched.libsonnet leaves that to the pipeline.
  make_sft_models:: false,
  validation:: std.extVar('APP__DATA_DIR') + '/validation_22march_256/tokenised',
  dataset(name):: std.extVar('APP__DATA_DIR') + '/earl-datasets/' + name + '/train/tokenised',

  // The published recipe. Its rate ran over ten epochs, of which the published models are a checkpoint; here it runs
  // over the steps up to theirs.
  fine_tuning(mixing, steps):: {
    base_model: 'BAAI/Emu3-Stage1',
    train_paths_file: [$.dataset(row[0]) for row in mixing],
    coefficients: [row[1] for row in mixing],
    steps: steps,
    batch_size: 64,
    learning_rate: 1e-4,
    final_learning_rate: 1e-5,
    schedule: 'cosine',
    warmup_steps: 30,
    weight_decay: 0.1,
    adam_beta1: 0.9,
    adam_beta2: 0.95,
    adam_epsilon: 1e-6,
    max_gradient_norm: 5.0,
    // Of the data in val_paths_file.
    validation: { examples: 1000, every_n_steps: 100 },
    save_checkpoints_every_n_steps: 100,
  },

  tokenizer_path: 'BAAI/Emu3-Gen',
  vision_tokenizer_path: 'BAAI/Emu3-VisionTokenizer',
  assistant_prefill: '<|image start|>',

  learning_rate: 3e-6,
  num_iterations: 2000,
  kl_coeff: 0.0003,
  temperature: 1.0,
  per_device_batch_size: 8,  // a group
  packing: 'groups',
  // Four 80 GB GPUs, as the paper had, sample and train; config/recipes/ has other machines.
  train_processes: 4,
  rollout_shards: 4,

  episodes_per_iteration: 128,
  generations_per_sample: 8,
  max_response_tokens: 2048,
  top_p: 1.0,
  top_k: -1,
  model_context_size: 4096,

  // Models of 8B parameters: a job without a GPU is refused, in the plan where stages run on this machine.
  device: 'cuda',
  engine: 'vllm',
  vllm_gpu_memory_utilization: 0.3,
  emu3_use_logit_processor: true,
  separate_language_and_vision_vocabs: true,

  judge: 'openai',
  reward_function_api_base: std.extVar('APP__REWARD_FUNCTION_API_BASE'),
  reward_function_api_model_name: 'Qwen/Qwen2.5-VL-72B-Instruct',
  reward_compute_viescore: true,
  reward_compute_ground_score: false,
  reward_final_reward: 'viescore',
  // Greedy, as the reference's server judged. A server that several runs share is slow to start and to answer.
  judge_temperature: 0.0,
  // All questions of an iteration: a server of one's own computes them together.
  judge_concurrency: 256,
  judge_timeout_seconds: 1000.0,
  judge_startup_seconds: 7200.0,

  // The paper's six benchmarks come with data/benchmarked.libsonnet.
  evaluations: {
    validation: { prompts: null, temperature: 1.0, every_n_iterations: 100 },
  },

  wandb_mode: 'offline',
  log_episodes_every_n_iterations: 5,
  keep_checkpoints_every_n_iterations: 100,
  save_checkpoints_every_n_iterations: 100,
  // `push_to_hub: true` turns it on.
  push_to_hub_every_n_iterations: 100,
  push_to_hub_repo_id: 'imged_rl__' + $.run_name,
}
