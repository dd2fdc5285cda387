// How the base model that ships with the package (earl/shapes/base_policy) was made: from random weights, over pairs that
// are seen once each. scripts/ship_shapes_base_policy.py runs it.
(import 'demo.jsonnet') + {
  run_name: 'shapes-base',
  raw_datasets+: {
    shapes_sft: { source: 'shapes', count: 80000, seed: 5 },
    shapes_heldout+: { count: 504 },
  },
  tokenizer_path: 'stage:shapes-policy',
  sft+: {
    shapes+: {
      base_model: 'stage:shapes-policy',
      steps: 2500,
      batch_size: 32,
      learning_rate: 3e-3,
      schedule: 'linear',
      warmup_steps: 100,
      decay_steps: 1000,
      // Which object is meant is hard to learn from edited images alone.
      instruction_loss_weight: 0.2,
    },
  },
  num_iterations: 0,
  evaluations: {
    heldout: { prompts: 504, temperature: 1.0 },
    heldout_greedy: { prompts: 504, temperature: 0.1 },
  },
}
