// Added to one of the ten experiments, it starts from raw data and makes its own SFT model:
//
//   (import 'sft_sc2stage__rl_sc.jsonnet') + (import 'data/raw.libsonnet')
//
// A data set is then $APP__DATA_DIR/raw/<name>.parquet, images and text in the columns that it is published with; the
// pipeline tokenises it. Held-out pairs (`validation`) have the columns of earl.files.tables.RAW.
local names = [row[0] for row in (import 'mixing.libsonnet').both];
local columns = (import 'columns.libsonnet') + { validation: { source: 'parquet' } };
{
  make_sft_models:: true,
  dataset(name):: 'stage:tokenise/' + name,
  raw_datasets: {
    [name]: columns[name] { path: std.extVar('APP__DATA_DIR') + '/raw/' + name + '.parquet' }
    for name in names + ['validation']
  },
  val_paths_file: [$.dataset('validation')],
}
