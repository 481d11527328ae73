"""The ruler: what things cost on this machine, beside their peers. Kept results are in minipaged/lab/results/."""
