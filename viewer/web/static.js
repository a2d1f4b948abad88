// Models and maps for a site without a server: files that `python -m viewer.publish` has written,
// gzipped JSON under a name that hosts do not decompress.

const NEEDS_MODEL = "This needs the model itself: run “python app.py” in a clone of the repository.";

// `base` is the URL of the files, `first` the key of the model that opens.
export function staticSource(base, first, report) {
  async function load(...names) {
    report("");
    try {
      const path = names.map(encodeURIComponent).join("/");
      const { ok, body } = await fetch(new URL(`${path}.bin`, base));
      if (ok) return await new Response(body.pipeThrough(new DecompressionStream("gzip"))).json();
    } catch { /* reported below */ }
    report("A file of this page could not be loaded; please try again.");
    return null;
  }

  async function refuse() {
    report(NEEDS_MODEL);
    return null;
  }

  return {
    describe: (model) => load(model || first, "model"),
    prepareImage: (model, { example }) => (example ? load(model || first, example) : refuse()),
    layerMaps: (model, image, layer) => load(model || first, `${image.name}-${layer}`),
    // only for the last snapshot, with all gates at 0 or all at 1
    recompute: (model, image, layer, snapshot, gates) => {
      const [gate, ...others] = gates.flatMap((values) => values ?? []);
      const isStored = snapshot === image.last && [0, 1].includes(gate) && others.every((other) => other === gate);
      return isStored ? load(model || first, `${image.name}-${layer}-${gate}`) : refuse();
    },
    exportFigure: refuse,
    train: (session, action) => (action === "status" ? { state: "static" } : refuse()),
  };
}
