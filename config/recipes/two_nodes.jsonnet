// Two nodes with eight 80 GB GPUs each; the judge is a server elsewhere. docs/recipes/two_nodes.md
(import '../sft_s__rl_s.jsonnet') + {
  // Of 16 prompts a rank samples one, and trains on the eight completions of one.
  train_processes: 16,
  rollout_shards: 16,
}
