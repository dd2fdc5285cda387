// The demo for longer: 100 iterations on more prompts, with a rate that falls to nothing, in a quarter of an hour.
local rarely = { every_n_iterations: 25 };
(import 'demo.jsonnet') + {
  run_name: 'demo-long',
  raw_datasets+: { shapes_rl+: { count: 8000 } },
  num_iterations: 100,
  learning_rate_schedule: 'linear',
  schedule_iterations: 100,
  kl_coeff: 0,
  evaluations+: { heldout+: rarely, heldout_greedy+: rarely },
}
