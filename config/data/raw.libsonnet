// Added to one of the ten experiments, it starts from raw data and makes its own SFT model:
//
//   (import 'sft_sc2stage__rl_sc.jsonnet') + (import 'data/raw.libsonnet')
//
// A data set is then $APP__DATA_DIR/raw/<name>.parquet, images and text; the pipeline tokenises it.
local names = [row[0] for row in (import 'mixing.libsonnet').both] + ['validation'];
{
  make_sft_models:: true,
  dataset(name):: 'stage:tokenise/' + name,
  raw_datasets: {
    [name]: { source: 'parquet', path: std.extVar('APP__DATA_DIR') + '/raw/' + name + '.parquet' }
    for name in names
  },
  val_paths_file: [$.dataset('validation')],
}
