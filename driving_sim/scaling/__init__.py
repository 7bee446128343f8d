"""A scaling law from small runs: the runs, the law, its report and its picture."""
