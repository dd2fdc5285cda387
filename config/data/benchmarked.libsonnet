// Added to one of the ten experiments, evaluates its starting policy and its last one on benchmarks:
//
//   (import 'sft_s__rl_c.jsonnet') + (import 'data/benchmarked.libsonnet')
//
// $APP__BENCHMARKS_DIR/<benchmark>/ holds the Parquet files of each.
local presets = import 'benchmarks.libsonnet';
local known = std.objectFields(presets);
local preset(name) =
  if std.objectHas(presets, name) then presets[name]
  else error 'benchmarks has %s, which is none of: %s' % [name, std.join(', ', known)];
{
  // Hidden fields, which --set can change: which benchmarks are wanted, and how all of them are sampled.
  benchmarks:: known,
  sampling:: { prompts: null, samples_per_prompt: 1, temperature: 1.0 },

  // Training data have some of the same names.
  raw_datasets+: {
    ['benchmark_' + name]: preset(name) { path: std.extVar('APP__BENCHMARKS_DIR') + '/' + name }
    for name in $.benchmarks
  },
  evaluations+: {
    [name]: $.sampling {
      paths_file: ['stage:tokenise/benchmark_' + name],
      every_n_iterations: $.num_iterations + 1,  // the starting policy and the last one
    }
    for name in $.benchmarks
  },
}
