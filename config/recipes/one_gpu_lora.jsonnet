// One 80 GB GPU and the published policy, of which an adapter is trained; the judge is a server elsewhere.
// docs/recipes/one_gpu_lora.md
(import '../sft_s__rl_s.jsonnet') + {
  lora: { rank: 64 },
  learning_rate: 3e-5,
  train_processes: 1,
  rollout_shards: 1,
  // One engine has all 128 episodes in its cache at once.
  vllm_gpu_memory_utilization: 0.5,
}
