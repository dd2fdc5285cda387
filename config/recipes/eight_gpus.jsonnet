// One node with eight 80 GB GPUs; the judge is a server elsewhere. docs/recipes/eight_gpus.md
(import '../sft_s__rl_s.jsonnet') + {
  // All eight ranks sample, each with an engine of its own, and all eight train.
  train_processes: 8,
  rollout_shards: 8,
}
