// One node with eight 80 GB GPUs: four for the policy, four for a 72B judge. docs/recipes/four_and_four.md
(import '../sft_s__rl_s.jsonnet') + {
  train_processes: 4,
  rollout_shards: 4,
  // The segment starts the judge on the GPUs that its ranks leave, and ends it.
  judge: 'vllm',
  reward_function_api_base: null,
  judge_tensor_parallel_size: 4,
}
