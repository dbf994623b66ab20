"""What a training run logged, as a picture."""


def plot(log_history: list[dict], path: str) -> None:
    """Writes a PNG: loss, error rate where it was evaluated, and learning rate, by step."""
    import matplotlib  # takes a second, which --help need not wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {  # log entry: label, colour (of Okabe and Ito), line
        "loss (nats per token)": {
            "loss": ("training", "#0072B2", "-"),
            "eval_loss": ("evaluation", "#D55E00", "o--"),
            "eval_loss_shuffled": ("evaluation, audio of others", "#000000", "s:"),
        },
        "error rate (%)": {"eval_wer": ("WER", "#D55E00", "o--"), "eval_cer": ("CER", "#009E73", "s:")},
        "learning rate": {"learning_rate": ("learning rate", "#0072B2", "-")},
    }
    logged = {name for entry in log_history for name in entry}
    panels = {label: curves for label, curves in panels.items() if logged & curves.keys()}
    if not panels:
        return
    figure, axes = pyplot.subplots(
        len(panels), figsize=(7, 1 + 2.3 * len(panels)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (label, curves) in zip(axes[:, 0], panels.items()):
        for name, (told, colour, line) in curves.items():
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            if points:
                axis.plot(*zip(*points), line, color=colour, label=told, markersize=4)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if label.startswith("loss"):
            axis.set_yscale("log")
        if len(curves) > 1:
            axis.legend()
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
