// Added to one of the ten experiments, it starts from raw data and makes its own SFT model:
//
//   (import 'sft_sc2stage__rl_sc.jsonnet') + (import 'data/raw.libsonnet')
//
// A data set is then $APP__DATA_DIR/raw/<name>.parquet, images and text, of the form that columns.libsonnet describes; the
// pipeline tokenises it. So it does with the benchmarks, see benchmarked.libsonnet; without them: benchmarks=[].
local columns = import 'columns.libsonnet';
local names = [row[0] for row in (import 'mixing.libsonnet').both] + ['validation'];
(import 'benchmarked.libsonnet') + {
  make_sft_models:: true,
  dataset(name):: 'stage:tokenise/' + name,
  raw_datasets+: {
    [name]: std.get(columns, name, { source: 'parquet' }) + { path: std.extVar('APP__DATA_DIR') + '/raw/' + name + '.parquet' }
    for name in names
  },
  validation:: $.dataset('validation'),
}
