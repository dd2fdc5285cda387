// A policy on the six benchmarks: a run without iterations. APP__POLICY is the policy's folder, for example
// <run>/iterations/002000/policy. data/benchmarked.libsonnet says where the benchmarks' files come from.
(import 'base.libsonnet') + {
  model_path: std.extVar('APP__POLICY'),
  num_iterations: 0,
  train_paths_file: [],
  val_paths_file: [],
  evaluations: {},
  // Hidden, and open to --set: whether the policy is one that was trained to reason first.
  reasoning:: false,
  assistant_prefill: if $.reasoning then (import 'models/think_s.libsonnet').assistant_prefill else super.assistant_prefill,
} + (import 'data/benchmarked.libsonnet')
