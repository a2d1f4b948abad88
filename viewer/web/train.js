// Training on the server, for one session at a time. Polls the status, and shows new snapshots.

import { find, isOwn, lastSnapshot, SESSION, state } from "./state.js";
import { draw, drawModels, navigate, setModel, showModel } from "./view.js";

let pollTimer = null;
// last epoch shown of the session's run; after the first one, the user may select another model
let shownEpoch = -1;

// Offer the session's model for selection, or stop to.
function listModel(listed) {
  const others = state.models.filter(({ key }) => key !== SESSION);
  state.models = listed ? [...others, { key: SESSION, name: "Your tiny model" }] : others;
  drawModels();
}

export async function train(action) {
  clearTimeout(pollTimer);
  const status = await state.source.train(SESSION, action);
  if (!status) return void (pollTimer = setTimeout(() => train("status"), 5000));
  const { state: phase, epoch } = status;
  const busy = phase === "waiting" || phase === "training";
  showStatus(status, busy);
  state.stopped = phase === "done";
  if (epoch >= 0 && !state.models.some(({ key }) => key === SESSION)) listModel(true);
  if (epoch > shownEpoch && (isOwn() || (busy && shownEpoch < 0))) {
    const previous = shownEpoch;
    shownEpoch = epoch;
    const shown = isOwn() ? await loadNewSnapshots() : await showModel(SESSION);
    if (!shown) shownEpoch = previous; // retried in a second
  }
  if (phase === "done" && isOwn()) draw();
  clearTimeout(pollTimer);
  if (busy) pollTimer = setTimeout(() => train("status"), 1000);
}

function showStatus({ state: phase, position, epoch, epochs, seconds_left: secondsLeft }, busy) {
  const remaining = secondsLeft === null ? "" : `, about ${secondsLeft} s left`;
  find(".train").hidden = busy;
  find(".train-stop").hidden = !busy;
  find(".train-progress").hidden = phase !== "training";
  find(".train-progress").value = phase === "training" ? (epoch + 1) / (epochs + 1) : 0;
  find(".train-status").textContent = {
    idle: "Train a tiny model on “Find the match” from scratch, on this server: two to three "
      + "minutes on two cores.",
    static: "On a server of your own (“python app.py”), a model trains while you watch.",
    full: "The queue is full; please try again later.",
    waiting: "Another model is training; "
      + (position === 1 ? "yours is next." : `${position} are ahead of you in the queue.`),
    training: epoch < 0 ? "Starting…"
      : `Epoch ${epoch} of ${epochs} is done${remaining}.`
        + (isOwn() ? " Its gates are shown live." : ""),
    done: (epoch < epochs ? "Stopped. " : "Done. ") + (isOwn()
      ? "Use the slider above to go through its training." : "Select “Your tiny model” above."),
    failed: "Training failed before its first epoch; please try again.",
  }[phase];
}

export async function startTraining() {
  if (isOwn()) await showModel(""); // the new run replaces the session's earlier one
  listModel(false);
  shownEpoch = -1;
  train("start");
}

// Load what a run in progress has written since; a view of its last snapshot moves to the new last
// one. False: try again.
export async function loadNewSnapshots() {
  const { key } = state;
  const answer = await state.source.describe(key, false);
  if (!answer || key !== state.key) return false;
  const before = state.model;
  if (answer.epochs.length === before.epochs.length
    && answer.curves?.epochs.length === before.curves?.epochs.length) return true;
  const atEnd = state.snapshot === lastSnapshot();
  if (answer.epochs.length > before.epochs.length) {
    await navigate({}, true);
    if (key !== state.key || !state.maps
      || state.maps.content.length < answer.epochs.length) return false;
  }
  setModel(answer);
  if (atEnd) await navigate({ snapshot: lastSnapshot() });
  draw();
  return true;
}
