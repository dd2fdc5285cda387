// The base of the ten experiments in the shapes world, which stands in for the data sets, with the demo's tiny Emu3 and
// program judge. Simple and complex edits have no edit type in common.
local demo = import '../demo.jsonnet';
local simple = ['recolour', 'remove', 'add', 'background'];
local complex = ['move', 'swap', 'count'];
demo + {
  // Large ones and small ones as among the real data sets: by its coefficient, each of the complex comes to about 300.
  raw_datasets+: {
    omniedit: { source: 'shapes', count: 2300, seed: 10, tasks: simple },
    magic_brush: { source: 'shapes', count: 50, seed: 11, tasks: complex },
    aurora_ag: { source: 'shapes', count: 50, seed: 12, tasks: complex },
    aurora_kubric: { source: 'shapes', count: 430, seed: 13, tasks: complex },
    ss2: { source: 'shapes', count: 190, seed: 14, tasks: complex },
    vismin: { source: 'shapes', count: 80, seed: 15, tasks: complex },
    'human-edit': { source: 'shapes', count: 27, seed: 16, tasks: complex },
  },

  make_sft_models:: true,
  dataset(name):: 'stage:tokenise/' + name,
  fine_tuning(mixing):: demo.sft.shapes + {
    train_paths_file: [$.dataset(row[0]) for row in mixing],
    coefficients: [row[1] for row in mixing],
  },

  // The longest reasoning of this world has about 100 tokens.
  max_response_tokens: if $.assistant_prefill == demo.assistant_prefill then demo.max_response_tokens else 200,
}
