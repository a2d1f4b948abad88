// Training on the server, for one session at a time. Polls the status, and shows new snapshots.

import { html, onClick, render } from "./dom.js";
import { isOwn, SESSION, state } from "./state.js";
import { ask, draw, drawModel, navigate, showModel } from "./view.js";

let pollTimer = null;
let isAwaited = false; // a run started here is to be shown when it has finished its first epoch

onClick(".train", async () => {
  // the new run replaces the session's earlier one
  if (isOwn()) await showModel(state.model.models[0].key);
  isAwaited = true;
  train("start");
});
onClick(".train-stop", () => train("stop"));

export async function train(action) {
  const poll = (delay) => { pollTimer = setTimeout(() => train("status"), delay); };
  clearTimeout(pollTimer);
  const status = await ask("train", { model: SESSION, action }, action !== "status");
  if (!status) return poll(5000);
  const { state: phase, epoch } = status;
  const busy = phase === "waiting" || phase === "training";
  if (phase !== "waiting") state.hasOwn = epoch >= 0; // while waiting, an earlier model is there
  const hasEnded = !busy && !state.stopped;
  state.stopped = !busy;
  showStatus(status, busy);
  drawModel();
  if (isOwn()) {
    if (hasEnded) draw();
    await loadNewSnapshots();
  } else if (isAwaited && busy && epoch >= 0) isAwaited = !(await showModel(SESSION, ""));
  clearTimeout(pollTimer);
  if (busy) poll(1000);
}

function showStatus({ state: phase, position, epoch, epochs, seconds_left: secondsLeft }, busy) {
  const remaining = secondsLeft === null ? "" : `, about ${secondsLeft} s left`;
  const message = {
    idle: "Train a tiny model on “Find the match” from scratch, on this server: two to three "
      + "minutes on two cores.",
    full: "The queue is full; please try again later.",
    waiting: "Another model is training; "
      + (position === 1 ? "yours is next." : `${position} are ahead of you in the queue.`),
    training: epoch < 0 ? "Starting…"
      : `Epoch ${epoch} of ${epochs} is done${remaining}.`
        + (isOwn() ? " Its gates are shown live." : ""),
    done: `${epoch < epochs ? "Stopped" : "Done"}. Play its training under `
      + "“Your tiny model” above.",
    failed: "Training failed; please try again.",
  }[phase];
  render(".training", html`<p>${message}</p>
    <button class="${busy ? "train-stop" : "train"}">${busy ? "Stop" : "Train"}</button>
    ${phase === "training" ? html`<progress max="1" value="${(epoch + 1) / (epochs + 1)}"
      aria-label="training"></progress>` : ""}`);
}

// Load what a run in progress has written since; a view of its last snapshot moves to the new last
// one.
export async function loadNewSnapshots() {
  const { key } = state;
  const answer = await ask("describe", {}, false);
  const { maps, model, snapshot } = state;
  if (!answer || key !== state.key || !maps) return;
  const shown = Math.min(maps.length, model.epochs.length); // maps may be ahead of the description
  const count = answer.epochs.length;
  if (answer.started !== model.started) return showModel(key, ""); // a new run in this folder
  if (count === shown && answer.curves?.epochs.length === model.curves?.epochs.length) return;
  state.model = answer;
  await navigate(snapshot === shown - 1 ? { snapshot: count - 1 } : {});
}
