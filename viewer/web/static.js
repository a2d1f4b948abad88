// Stands in for app.py on a site without a server: reads the files that `python -m viewer.publish`
// wrote, gzipped JSON named .bin, so that hosts do not decompress it.

const MISSING = { error: "A file of this page could not be loaded; please try again." };
const NEEDS_MODEL = { error: "On this site, gates can be pinned only in the last epoch, and "
  + "only for all layers at once. For more, run “python app.py” in a clone of convit-min." };

// `base` is the URL of the files, `first` the key of the model that opens.
export function staticServer(base, first) {
  async function load(model, name, error = MISSING) {
    const path = `${encodeURIComponent(model || first)}/${encodeURIComponent(name)}.bin`;
    const { ok, body } = await fetch(new URL(path, base));
    if (!ok) return error;
    return new Response(body.pipeThrough(new DecompressionStream("gzip"))).json();
  }

  return {
    describe: ({ model }) => load(model, "model"),
    prepare_image: ({ model, example }) => load(model, example),
    layer_maps: ({ model, pixels: name, layer }) => load(model, `${name}-${layer}`),
    // published for the last snapshot, with all gates at 0 or all at 1
    recompute: ({ model, pixels: name, layer, snapshot, gates }) => load(model,
      `${name}-${layer}-${snapshot}-${[...new Set(gates.flatMap((heads) => heads ?? []))]}`,
      NEEDS_MODEL),
  };
}
