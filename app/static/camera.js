// A photo from the computer's camera; phones have their own, better one.

/**
 * Show the viewfinder and return the photo that was taken, or null.
 * @param {HTMLDialogElement} dialog
 */
export async function takePhoto(dialog) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const video = dialog.querySelector("video");
  const shoot = dialog.querySelector("#shoot");
  shoot.disabled = true; // before the first frame there is no photo
  video.onloadeddata = () => (shoot.disabled = false);
  video.srcObject = stream;
  dialog.showModal();
  try {
    return await new Promise((done) => {
      shoot.onclick = () => capture(video).then(done);
      dialog.querySelector("#leave").onclick = () => done(null);
      dialog.oncancel = () => done(null);
    });
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    dialog.close();
  }
}

async function capture(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  return new File([blob], "photo.jpg", { type: "image/jpeg" });
}
