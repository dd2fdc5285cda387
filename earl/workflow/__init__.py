"""What the rules in ``workflow/`` need to know, in plain Python: nothing here imports Snakemake."""
