// Added to one of the ten experiments, evaluates its starting policy and its last one on benchmarks:
//
//   (import 'sft_s__rl_c.jsonnet') + (import 'data/benchmarked.libsonnet')
//
// Their files are downloaded from the hub; with `benchmarks_dir` those of a folder are taken, <folder>/<benchmark>/*.parquet.
local presets = import 'benchmarks.libsonnet';
local known = std.objectFields(presets);
local parts(name) =
  if std.objectHas(presets, name) then presets[name]
  else error 'benchmarks has %s, which is none of: %s' % [name, std.join(', ', known)];
{
  // Hidden fields, which --set can change: which benchmarks are wanted, where their files lie (null: on the hub), and
  // how all of them are sampled. The paper's evaluation code samples once among the 2,048 likeliest tokens, and tells
  // the size of the image, which is the original's, to policies that do not reason.
  benchmarks:: ['omniedit', 'emuedit', 'aurora', 'magicbrush', 'vismin', 'i2ebench'],
  benchmarks_dir:: null,
  sampling:: {
    prompts: null,
    samples_per_prompt: 1,
    temperature: 1.0,
    top_k: 2048,
    assistant_prefill: if $.assistant_prefill == '<|image start|>' then '<|image start|>{H}*{W}' else null,
  },

  local path(name, preset) =
    if $.benchmarks_dir != null then $.benchmarks_dir + '/' + preset.files
    else if std.objectHas(preset, 'path') then preset.path
    else error 'benchmark %s is no Parquet file on the hub: run `earl data fetch %s --to <folder>` and set benchmarks_dir to that folder' % [name, name],
  // Training data have some of the same names.
  raw_datasets+: {
    ['benchmark_' + part]: parts(name)[part] { path: path(name, parts(name)[part]) }
    for name in $.benchmarks
    for part in std.objectFields(parts(name))
  },
  evaluations+: {
    [name]: $.sampling {
      paths_file: ['stage:tokenise/benchmark_' + part for part in std.objectFields(parts(name))],
      every_n_iterations: $.num_iterations + 1,  // the starting policy and the last one
    }
    for name in $.benchmarks
  },
}
