// A run on four 80 GB GPUs that shares a judge server with others. docs/recipes/shared_judge.md
(import '../sft_s__rl_s.jsonnet') + {
  train_processes: 4,
  rollout_shards: 4,
  // Of each rank. What the server has no time for is asked again, later and less at once.
  judge_concurrency: 64,
}
