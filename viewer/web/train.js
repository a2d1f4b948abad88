// Training on the server, for one session at a time: polls the status and shows new snapshots as they appear.

let pollTimer = null;
let shownEpoch = -1; // last epoch shown of the session's run; after the first one, the user may select another model

async function train(action) {
  clearTimeout(pollTimer);
  const status = await callServer("train", { session: SESSION, action }, action !== "status");
  if (!status) return void (pollTimer = setTimeout(() => train("status"), 5000));
  const { state: phase, epoch } = status;
  const busy = phase === "waiting" || phase === "training";
  showStatus(status, busy);
  if (epoch >= 0 && find(".models").options.length < 2) {
    find(".models").add(new Option("trained here", SESSION));
    find(".model-choice").classList.remove("unavailable");
  }
  if (busy && epoch >= 0 && (state.session !== SESSION ? shownEpoch < 0 : epoch > shownEpoch)) {
    const previous = shownEpoch;
    shownEpoch = epoch;
    if (state.session !== SESSION) await showRun(SESSION);
    else if (!(await loadNewSnapshots())) shownEpoch = previous; // retried in a second
  }
  if (phase === "done" && state.session === SESSION && epoch > shownEpoch && (await loadNewSnapshots())) shownEpoch = epoch;
  clearTimeout(pollTimer);
  if (busy) pollTimer = setTimeout(() => train("status"), 1000);
}

function showStatus({ state: phase, position, epoch, epochs, seconds_left: secondsLeft }, busy) {
  const onDisplay = state.session === SESSION;
  const remaining = secondsLeft === null ? "" : `, about ${secondsLeft} s left`;
  find(".train").hidden = busy;
  find(".train-stop").hidden = !busy;
  find(".train-progress").hidden = phase !== "training";
  find(".train-progress").value = phase === "training" ? (epoch + 1) / (epochs + 1) : 0;
  find(".train-status").textContent = {
    idle: "Train a nano model from scratch on this server, in two to three minutes on two cores. Each image has one plain square and three textured ones; the label is the texture whose color matches the plain square.",
    full: "The queue is full; please try again later.",
    waiting: `Another model is training; ${position === 1 ? "yours is next" : `${position} are ahead of you in the queue`}.`,
    training: epoch < 0 ? "Starting…" : `Epoch ${epoch} of ${epochs} is done${remaining}.${onDisplay ? " Its gates are shown live." : ""}`,
    done: `${epoch < epochs ? "Stopped" : "Done"}. ${onDisplay ? "Use the slider above to go through its training." : "Select “trained here” above to view it."}`,
    failed: "Training failed before its first epoch; please try again.",
  }[phase];
}

async function startTraining() {
  if (state.session === SESSION) await showRun(""); // the new run replaces the session's earlier one
  if (find(".models").options.length > 1) find(".models").remove(1);
  find(".model-choice").classList.add("unavailable");
  shownEpoch = -1;
  train("start");
}

// Load what a run in progress has written since; a view of its last snapshot moves to the new last one. False: try again.
async function loadNewSnapshots() {
  const { session } = state;
  const answer = await callServer("describe", {}, false);
  if (!answer || session !== state.session) return false;
  if (answer.epochs.length > model.epochs.length) {
    await navigate({});
    if (session !== state.session || !layerMaps || layerMaps.content.length < answer.epochs.length) return false;
  } else if (answer.curves?.epochs.length === model.curves?.epochs.length) return true;
  const atEnd = state.snapshot === model.epochs.length - 1;
  setModel(answer);
  find(".snapshot").max = model.epochs.length - 1;
  if (atEnd) state.snapshot = model.epochs.length - 1;
  draw();
  return true;
}
