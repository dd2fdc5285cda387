// A policy on the six benchmarks: a run without iterations. APP__POLICY is the policy's folder, for example
// <run>/iterations/002000/policy; $APP__BENCHMARKS_DIR/<benchmark>/ holds the Parquet files of each.
local benchmarks = import 'data/benchmarks.libsonnet';
(import 'base.libsonnet') + {
  model_path: std.extVar('APP__POLICY'),
  num_iterations: 0,
  train_paths_file: [],
  val_paths_file: [],
  raw_datasets: {
    [name]: benchmarks[name] { path: std.extVar('APP__BENCHMARKS_DIR') + '/' + name }
    for name in std.objectFields(benchmarks)
  },
  // Hidden, and open to --set: how all of them are sampled.
  sampling:: { prompts: null, samples_per_prompt: 1, temperature: 1.0 },
  evaluations: {
    [name]: $.sampling { paths_file: ['stage:tokenise/' + name] }
    for name in std.objectFields(benchmarks)
  },
}
