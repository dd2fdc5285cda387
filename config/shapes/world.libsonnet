// The base of the ten experiments in the shapes world, which stands in for the data sets, with the demo's tiny Emu3 and
// program judge. Simple and complex edits have no edit type in common.
local demo = import '../demo.jsonnet';
local simple = ['recolour', 'remove', 'add', 'background'];
local complex = ['move', 'swap', 'count'];
local mixing = import '../data/mixing.libsonnet';
local mistakes = { [name]: demo.raw_datasets.shapes_sft[name] for name in ['unchanged_fraction', 'damaged_fraction'] };
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
    heldout_simple: { source: 'shapes', count: $.heldout, seed: 20, tasks: simple },
    heldout_complex: { source: 'shapes', count: $.heldout, seed: 21, tasks: complex },
  } + {
    // Fine-tuning without reasoning has pairs of its own, with the demo's mistakes, for RL to undo. RL needs right
    // targets, since the program judge measures against them; reasoning is learned from right pairs alone, see below.
    [row[0] + '_mixed']: $.raw_datasets[row[0]] + mistakes + { seed: $.raw_datasets[row[0]].seed + 100 }
    for row in mixing.simple + mixing.complex
  },
  heldout:: 120,
  val_paths_file: [],
  evaluations: {
    [kind]: {
      paths_file: ['stage:tokenise/heldout_' + kind],
      prompts: null,
      temperature: 0.1,
      every_n_iterations: $.num_iterations + 1,  // the starting policy and the last one
    }
    for kind in ['simple', 'complex']
  },

  make_sft_models:: true,
  dataset(name):: 'stage:tokenise/' + name,
  // The base model has never reasoned, and its image then stands further from the original than it ever did: that takes
  // more, a rate that falls, and right pairs: on the mixed ones simple edits come to 2.6 instead of 4.8 by 1,200 steps,
  // and after as few RL on complex edits costs a fourth. By the demo's 250 steps at its rate edits with reasoning score 0.
  thinks:: $.assistant_prefill != demo.assistant_prefill,
  sft_steps:: if $.thinks then 2000 else demo.sft.shapes.steps,
  fine_tuning(mixing, steps):: demo.sft.shapes + {
    steps: $.sft_steps,  // of the tiny model, not of the published ones
    train_paths_file: [$.dataset(row[0] + if $.thinks then '' else '_mixed') for row in mixing],
    coefficients: [row[1] for row in mixing],
  } + if !$.thinks then {} else {
    batch_size: 16,
    learning_rate: 2e-3,
    schedule: 'linear',
    warmup_steps: std.min(20, std.floor(self.steps / 2)),
    decay_steps: std.min(600, self.steps - self.warmup_steps),
  },

  // The longest reasoning of this world has about 100 tokens.
  max_response_tokens: if $.thinks then 200 else demo.max_response_tokens,
}
