// Data sets by name, with their mixing coefficients. Complex edits are mixed as in the paper: each data set comes to
// about 50,000 examples. In both, OmniEdit is cut down to the size of one of the others.
{
  simple: [['omniedit', 1.0]],
  complex: [
    ['magic_brush', 6],
    ['aurora_ag', 6],  // AURORA, action-genome
    ['aurora_kubric', 0.7],
    ['ss2', 1.55],  // Something-Something-v2
    ['vismin', 3.7],
    ['human-edit', 11],
  ],
  both: [['omniedit', 0.13]] + self.complex,
}
