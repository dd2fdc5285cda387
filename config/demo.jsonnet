// The whole pipeline on a laptop: a synthetic world of shapes, a tiny Emu3, a program as judge. Needs no variable.
{
  run_name: 'demo',
  base_exp_dir: 'runs',
  random_seed: 42,

  // Pairs with different seeds have nothing in common.
  raw_datasets: {
    // As real pairs are: of mixed quality. Fine-tuning imitates the mistakes, and RL, by the judge alone, undoes that.
    shapes_sft: { source: 'shapes', count: 2000, seed: 1, unchanged_fraction: 0.35, damaged_fraction: 0.25 },
    shapes_rl: { source: 'shapes', count: 1000, seed: 2 },
    shapes_heldout: { source: 'shapes', count: 504, seed: 3 },
  },
  train_paths_file: ['stage:tokenise/shapes_rl'],
  coefficients: [1.0],
  val_paths_file: ['stage:tokenise/shapes_heldout'],
  val_coefficients: [1.0],

  model_path: 'stage:sft/shapes',
  tokenizer_path: 'package:shapes/base_policy',
  vision_tokenizer_path: 'package:shapes/vision_tokenizer',
  image_area: 64 * 64,
  assistant_prefill: '<|image start|>',
  sft: {
    shapes: {
      // Trained for 25 minutes by shapes_base.jsonnet; `stage:shapes-policy` would start from random weights.
      base_model: 'package:shapes/base_policy',
      train_paths_file: ['stage:tokenise/shapes_sft'],
      coefficients: [1.0],
      steps: 250,
      save_checkpoints_every_n_steps: 125,  // one takes as long as a step
      batch_size: 8,
      learning_rate: 5e-4,
      warmup_steps: std.min(20, self.steps),
      random_seed: 42,
    },
  },

  num_iterations: 20,
  episodes_per_iteration: 256,
  generations_per_sample: 8,
  per_device_batch_size: 8,
  packing: 'groups',
  // A tiny model's activations fit; computing them twice would cost a quarter more.
  gradient_checkpointing: false,
  learning_rate: 4e-4,
  // An image of 8 x 8 visual tokens takes 79 at most, from `8*8` to eos.
  max_response_tokens: 96,
  model_context_size: 320,

  engine: 'torch',
  engine_batch_size: 64,
  judge: 'program',
  device: 'cpu',
  dtype: 'float32',
  // One thread a process: two processes side by side use two cores better than one with two threads.
  cpu_threads: 1,
  rollout_shards: 2,
  train_processes: 2,

  evaluations: {
    heldout: { prompts: 504, temperature: 1.0, every_n_iterations: 10 },
    heldout_greedy: { prompts: 504, temperature: 0.1, every_n_iterations: 10 },
  },
  save_checkpoints_every_n_iterations: 5,
  keep_checkpoints_every_n_iterations: 20,
}
