// How the base model that ships with the package (earl/shapes/base_policy) was made: the demo's fine-tuning, from random
// weights and for longer. scripts/ship_shapes_base_policy.py runs it.
(import 'demo.jsonnet') + {
  run_name: 'shapes-base',
  raw_datasets+: { shapes_sft: { source: 'shapes', count: 24000, seed: 5 } },
  tokenizer_path: 'stage:shapes-policy',
  sft+: {
    shapes+: {
      base_model: 'stage:shapes-policy',
      steps: 4000,
      batch_size: 16,
      learning_rate: 3e-3,
      warmup_steps: 100,
    },
  },
}
