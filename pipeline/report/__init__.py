"""Reports for people: the HTML page of a training run and the figure of the degradation experiment."""
