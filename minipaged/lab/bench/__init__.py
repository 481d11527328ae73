"""The ruler: what things cost on this machine, beside their peers, and the tables made of it. See minipaged/lab/results/."""
