"""What a run leaves behind: the summary and the names of its folders."""

from bnkernels.config import TrainingConfig
from bnkernels.runs import TrainingResult, default_folder, summarise


def entry(step, accuracy, us_per_step):
    return {"epoch": step, "step": step, "loss": 0.5, "accuracy": accuracy, "us_per_step": us_per_step}


def test_the_summary_takes_the_first_crossing_and_the_median_without_the_first_epoch():
    history = [entry(10, 0.9, 900), entry(20, 0.95, 30), entry(30, 0.94, 20), entry(40, 0.93, 10)]
    assert summarise(history) == {
        "test_accuracy": 0.93,
        "training_loss": 0.5,
        "steps_to_95_percent": 20,
        "us_per_step": 20,
    }
    assert summarise([entry(10, 0.9499, 900)])["us_per_step"] == 900
    assert summarise([entry(10, 0.9499, 900)])["steps_to_95_percent"] is None


def test_the_ratio_needs_both_networks():
    def ratio(**times):
        history = {norm: [entry(1, 1, time)] for norm, time in times.items()}
        return TrainingResult("finished", TrainingConfig(), {}, "cpu", {}, history, {}).summary["step_time_ratio"]

    assert ratio(batch=30, none=20) == 1.5
    assert ratio(batch=30) is None


def test_default_folders_never_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bnkernels.runs.strftime", lambda form: "20300102-030405")
    for name in ("digits-20300102-030405", "digits-20300102-030405-2", "digits-20300102-030405-3"):
        folder = default_folder("digits")
        assert folder.as_posix() == f"runs/{name}"
        assert list(folder.iterdir()) == []
