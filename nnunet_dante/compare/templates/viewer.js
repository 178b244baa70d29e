// One NiiVue canvas. The first volume is the image, the others are masks with the colours of the labels. A mask is
// fetched when it is first to be seen.
export default {
  template: `<div class="viewer"><canvas ref="canvas" tabindex="0" role="img" :aria-label="label"></canvas></div>`,
  props: { volumes: Array, colours: Object, label: String },
  created() {
    // Not reactive: NiiVue's objects are large.
    Object.assign(this, { opacities: {}, masks: {}, names: [], key: "", turn: Promise.resolve() });
  },
  async mounted() {
    this.module = window.niivue ?? await import("/niivue.js"); // a report has loaded it
    const light = document.body.classList.contains("body--dark") ? 0.1 : 0;
    this.nv = new this.module.Niivue({ backColor: [light, light, light, 1], show3Dcrosshair: true, isColorbar: false,
      loadingText: "", dragAndDropEnabled: false, crosshairWidthUnit: "percent", crosshairWidth: 0.3,
      multiplanarShowRender: this.module.SHOW_RENDER.ALWAYS });
    this.nv.onLocationChange = (at) => this.$emit("location", at.string);
    await this.nv.attachToCanvas(this.$refs.canvas);
    this.nv.setInterpolation(true);
    const gl = this.nv.gl, card = gl.getExtension("WEBGL_debug_renderer_info");
    this.slow = /swiftshader|llvmpipe|software/i.test(gl.getParameter(card?.UNMASKED_RENDERER_WEBGL ?? gl.RENDERER));
    await this.load();
  },
  beforeUnmount() {
    this.nv?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  },
  watch: {
    volumes() { this.load(); },
  },
  methods: {
    // Volumes are loaded one after the other: NiiVue takes the first one that arrives as the image.
    inTurn(change) {
      this.turn = this.turn.then(change).catch((error) => this.$emit("failed", error.message ?? String(error)));
    },
    load() {
      const key = JSON.stringify(this.volumes ?? []), volumes = this.volumes ?? [];
      if (!this.nv || key === this.key || !volumes.length) return this.turn;
      this.key = key;
      this.inTurn(async () => {
        if (key !== this.key) return; // another case was chosen in between
        this.masks = {};
        this.names = [];
        await this.nv.loadVolumes([]);
        this.nv.addVolume(await this.read(volumes[0]));
        this.shown();
      });
      volumes.slice(1).forEach((volume) => this.see(volume));
      return this.turn;
    },
    async read(volume) {
      const answer = await fetch(volume.url + (this.slow && volume.url.startsWith("/") ? "?slow=1" : ""));
      if (!answer.ok) throw new Error(await answer.text());
      if (volume.name === "image") this.$emit("reduced", answer.headers.get("X-Reduced") ?? "");
      return this.module.NVImage.loadFromUrl({ url: volume.url, buffer: await answer.arrayBuffer(), name: volume.file,
        colormap: volume.name === "image" ? "gray" : "red", opacity: this.opacities[volume.name] ?? 1 });
    },
    see(volume) {
      const key = this.key;
      this.inTurn(async () => {
        if (key !== this.key || !this.opacities[volume.name] || this.names.includes(volume.name)) return;
        this.names.push(volume.name);
        const mask = await this.read(volume);
        if (key !== this.key) return;
        mask.opacity = this.opacities[volume.name];
        mask.setColormapLabel(this.colours);
        this.masks[volume.name] = mask;
        this.nv.volumes.push(mask); // addVolume would send the image to the graphics card again
        this.nv.overlays = this.nv.volumes.slice(1);
        this.draw(1);
        this.shown();
      });
    },
    draw(first, last = Infinity) { // only these layers go to the graphics card: the image takes long
      this.nv.volumes.forEach((volume, layer) => first <= layer && layer <= last && this.nv.refreshLayers(volume, layer));
      this.nv.drawScene();
    },
    shown() {
      this.$refs.canvas.dataset.shown = this.nv.volumes.length;
    },
    opacity(name, value) {
      this.opacities[name] = value;
      const mask = this.masks[name], volume = (this.volumes ?? []).find((v) => v.name === name);
      if (mask) {
        mask.opacity = value;
        this.draw(1);
      } else if (this.key && volume) this.see(volume);
    },
    arrange(how) {
      this.nv?.setSliceType(this.module.SLICE_TYPE[how.toUpperCase()]);
    },
    outlines(width) {
      if (!this.nv) return;
      this.nv.overlayOutlineWidth = width;
      this.draw(1);
    },
    window(low, high) {
      const image = this.nv?.volumes[0];
      if (!image) return;
      image.cal_min = image.global_min + low * (image.global_max - image.global_min);
      image.cal_max = image.global_min + high * (image.global_max - image.global_min);
      this.draw(0, 0);
    },
  },
};
