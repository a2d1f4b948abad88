// Training on the server, for one session at a time. Polls the status, and shows new snapshots.

import { html, onClick, render } from "./dom.js";
import { isOwn, SESSION, state } from "./state.js";
import { ask, draw, drawModel, navigate, setModel, showModel } from "./view.js";

let pollTimer = null;
// last epoch shown of the session's run; after the first one, the user may select another model
let shownEpoch = -1;
let isFollowed = false; // the user has started a run here

export function bindTraining() {
  onClick(".train", async () => {
    // the new run replaces the session's earlier one
    if (isOwn()) await showModel(state.model.models[0].key);
    shownEpoch = -1;
    isFollowed = true;
    train("start");
  });
  onClick(".train-stop", () => train("stop"));
  train("status");
}

async function train(action) {
  const poll = (delay) => { pollTimer = setTimeout(() => train("status"), delay); };
  clearTimeout(pollTimer);
  const status = await ask("train", { model: SESSION, action }, action !== "status");
  if (!status) return poll(5000);
  const { state: phase, epoch } = status;
  const busy = phase === "waiting" || phase === "training";
  state.hasOwn = epoch >= 0;
  state.stopped = !busy;
  showStatus(status, busy);
  if (epoch > shownEpoch && (isOwn() || (isFollowed && busy && shownEpoch < 0))) {
    const shown = isOwn() ? await loadNewSnapshots() : await showModel(SESSION, "");
    if (shown) shownEpoch = epoch; // else retried in a second
  }
  drawModel();
  if (isOwn() && state.stopped) draw();
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
    done: (epoch < epochs ? "Stopped. " : "Done. ") + (isOwn()
      ? "Use the slider above to go through its training." : "Select “Your tiny model” above."),
    failed: "Training failed; please try again.",
  }[phase];
  render(".training", html`<p>${message}</p>
    <button class="${busy ? "train-stop" : "train"}">${busy ? "Stop" : "Train"}</button>
    ${phase === "training" ? html`<progress max="1" value="${(epoch + 1) / (epochs + 1)}"
      aria-label="training"></progress>` : ""}`);
}

// Load what a run in progress has written since; a view of its last snapshot moves to the new last
// one. False: try again.
export async function loadNewSnapshots() {
  const { key } = state;
  const answer = await ask("describe", {}, false);
  const { maps, model, snapshot } = state;
  if (!answer || key !== state.key || !maps) return false;
  const last = answer.epochs.length - 1;
  if (last === maps.length - 1
    && answer.curves?.epochs.length === model.curves?.epochs.length) return true;
  setModel(answer);
  await navigate(snapshot === maps.length - 1 ? { snapshot: last } : {});
  return state.maps?.length > last;
}
