"""What stands behind `minipaged learn`: the catalogue, a learner's folder, checking, and the small parts that lessons share."""
