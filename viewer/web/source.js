// Where the page gets its models and maps: Python functions, which Gradio offers as `server`.
// A site without a server replaces this object; every method returns null after an error, which
// it has reported with `report`.

export function serverSource(server, report) {
  async function call(name, request, showError = true) {
    let answer = null;
    try {
      answer = await server[name](request);
    } catch { /* reported below */ }
    const offline = "The server is not responding; please try again.";
    if (showError) report(answer ? answer.error ?? "" : offline);
    return answer && !answer.error ? answer : null;
  }

  return {
    // the model of a key: "" for the first one, or the session that has trained it
    describe: (model, showError) => call("describe", { model }, showError),
    // { example: name } or { file: base64 }: display and input as data URLs, and pixels
    prepareImage: (model, image) => call("prepare_image", { model, ...image }),
    // content maps and predictions of an image in one layer, for all snapshots
    layerMaps: (model, image, layer) =>
      call("layer_maps", { model, pixels: image.pixels, layer }),
    // the same for one snapshot with changed gates (null: trained)
    recompute: (model, image, layer, snapshot, gates) =>
      call("recompute", { model, pixels: image.pixels, layer, snapshot, gates }),
    // a PNG or GIF of a view: { layer, head, snapshot, query, gates, animated }
    exportFigure: (model, image, view) =>
      call("export", { model, pixels: image.pixels, display: image.display, ...view }),
    // start, stop, or status of the training run of a session
    train: (session, action) => call("train", { model: session, action }, action !== "status"),
  };
}
