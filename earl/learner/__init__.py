"""The learner: formulas, rewards, the loops of RL and SFT, and the state they go on from."""
