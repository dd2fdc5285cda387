// One 80 GB GPU and a policy of your own with at most 3B weights, a folder; the judge is a server elsewhere.
// docs/recipes/one_gpu_small.md
(import '../sft_s__rl_s.jsonnet') + {
  model_path: std.extVar('APP__POLICY'),
  sft: {},
  train_processes: 1,
  rollout_shards: 1,
  vllm_gpu_memory_utilization: 0.3,
}
