// Added to one of the ten experiments, has the pipeline fetch the published tokenised data that it reads:
//
//   (import 'sft_s__rl_s.jsonnet') + (import 'data/fetched.libsonnet')
//
// They are downloaded and converted once for all runs below base_exp_dir; APP__DATA_DIR is not needed then.
{
  dataset(name):: 'stage:fetch/' + name,
  validation:: $.dataset('validation'),
}
